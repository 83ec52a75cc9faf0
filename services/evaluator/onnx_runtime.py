"""Graphs run by ONNX Runtime on the CPU, each form with the settings that make its figures mean something."""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from granq.v1 import reports_pb2
from services.common.errors import GranqError, InvalidArgumentError, ResourceExhaustedError
from services.evaluator.graph import Graph, constants_of
from services.evaluator.saturation import codes_may_exceed_127, with_weight_zero_points

RUNTIME = f"onnxruntime {onnxruntime.__version__}"
INT8_KERNELS = frozenset(
    {
        "ConvInteger",
        "DynamicQuantizeMatMul",
        "MatMulInteger",
        "MatMulIntegerToFloat",
        "QGemm",
        "QLinearConv",
        "QLinearMatMul",
    }
)
FLOAT_KERNELS = frozenset({"Conv", "FusedConv", "FusedGemm", "FusedMatMul", "Gemm", "MatMul", "NhwcFusedConv"})


@dataclass(frozen=True)
class KernelCounts:
    """Convolution and linear layers of a runtime's optimized graph.

    Attributes:
        int8: Those that run as INT8 kernels.
        total: All of them.
    """

    int8: int
    total: int


class OnnxModel:
    """A graph ready to run.

    The float form and onnx_ort run with all optimizations. The onnx_trt form runs with none, because its graph is exact
    integer arithmetic in float32 only as it is written. For onnx_ort the optimized graph is read back and its kernels
    are counted: it is the only proof that layers run in INT8.

    Args:
        graph: The graph.
        form: FLOAT, ONNX_TRT or ONNX_ORT.
        threads: Threads to run with; 0 for one per physical core.
        field: Request field that named the graph, for errors.

    Attributes:
        input_shape: Channels, height and width of an image.
        num_classes: Number of logits.
        kernels: Counts from the optimized graph; None for forms other than ONNX_ORT.

    Raises:
        InvalidArgumentError: ONNX Runtime refuses the graph.
    """

    def __init__(self, graph: Graph, form: reports_pb2.MeasuredForm, threads: int, field: str) -> None:
        # The parsed graph itself is not kept: its weights are in the session now, and may be hundreds of megabytes.
        self.input_shape = graph.input_shape
        self.num_classes = graph.num_classes
        self._input, self._output = graph.input_name, graph.output_name
        self.kernels: KernelCounts | None = None
        self._field = field
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        # Threads that spin while they wait take the processor from the other services of this machine, and from the
        # thread they wait for where there are fewer processors than threads.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3  # Errors; they also arrive as exceptions.
        options.graph_optimization_level = (
            onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
            if form == reports_pb2.MEASURED_FORM_ONNX_TRT
            else onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        )
        if form != reports_pb2.MEASURED_FORM_ONNX_ORT:
            self._session = self._open(graph.model, options)
            return
        model = graph.model
        if codes_may_exceed_127(model):
            # Ignored where the processor has VNNI, whose kernels do not saturate.
            options.add_session_config_entry("session.x64quantprecision", "1")
            model = with_weight_zero_points(model)
        with TemporaryDirectory(prefix="granq-") as folder:
            optimized = Path(folder, "optimized.onnx")
            options.optimized_model_filepath = str(optimized)
            self._session = self._open(model, options)
            self.kernels = count_kernels(onnx.load(str(optimized), load_external_data=False))

    def run(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return float32 N×K logits of float32 N×C×H×W images.

        Raises:
            InvalidArgumentError: The graph fails, or gives logits that are not finite numbers.
            ResourceExhaustedError: There is no memory for this batch.
        """
        try:
            (logits,) = self._session.run([self._output], {self._input: images})
        except Exception as error:
            raise self._error("run", error) from error
        result = np.asarray(logits, np.float32)
        if not np.isfinite(result).all():
            raise InvalidArgumentError("the graph gives logits that are infinite or NaN", field=self._field)
        return result

    def _open(self, model: onnx.ModelProto, options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
        try:
            return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise self._error("load", error) from error

    def _error(self, verb: str, error: Exception) -> GranqError:
        # ONNX Runtime's exceptions share no base class but Exception, and tell of exhausted memory only in words.
        text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if isinstance(error, MemoryError) or "allocate memory" in text or "bad_alloc" in text:
            return ResourceExhaustedError("no memory for this batch; use a smaller batch_size", reason="OUT_OF_MEMORY")
        return InvalidArgumentError(f"ONNX Runtime cannot {verb} the graph: {text}", field=self._field)


def count_kernels(optimized: onnx.ModelProto) -> KernelCounts:
    """Count the convolution and linear layers of an optimized graph by what runs them."""
    constants = constants_of(optimized.graph)
    kinds = [node.op_type for node in optimized.graph.node if not _is_blocked_multiply(node, constants)]
    int8 = sum(kind in INT8_KERNELS for kind in kinds)
    return KernelCounts(int8, int8 + sum(kind in FLOAT_KERNELS for kind in kinds))


def _is_blocked_multiply(node: onnx.NodeProto, constants: dict[str, onnx.TensorProto]) -> bool:
    """Whether a Conv is what the runtime makes of a multiplication by a constant per channel in its blocked layout."""
    if node.op_type != "Conv" or node.domain != "com.microsoft.nchwc":
        return False
    weight = constants.get(node.input[1])
    return weight is not None and list(weight.dims)[1:] == [1, 1, 1]
