"""What all accuracy tables have in common: a model, a labelled set, and runs of one method with one seed each.

Runs use the services' own modules in this process, so a table measures what a pipeline would give, without its servers.
"""

import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor, fx

from granq.v1 import common_pb2, reports_pb2
from services.common.artifacts import ArtifactStore
from services.common.datasets import open_dataset
from services.common.models import LoadedModel, load_model
from services.common.onnx_runtime_flavour import to_onnx_runtime
from services.evaluator.graph import load_graph
from services.evaluator.onnx_runtime import OnnxModel
from services.generator.synthesis import SynthesisParameters, Synthesizer
from services.generator.synthetic_set import REFINED_SHARE, REFINEMENT_STEPS, SetPlan, batches_of
from services.quantizer.batches import Batch, BatchSource, ReplaySource
from services.quantizer.calibrate import calibrate
from services.quantizer.config import GeneratorLosses, Quantization, Training
from services.quantizer.flat_areas import FlatAreas
from services.quantizer.integer import to_integer
from services.quantizer.onnx_export import export_trt
from services.quantizer.student import build_student, no_grad_copy, simulated_logits, stop_tracking, tracking_paused
from services.quantizer.training import Trainer

CPU = torch.device("cpu")
ELEMENTS = 2**22  # of input in a batch of the exported graph, whose runtime keeps many activations in memory
REFINED_NOTE = f"{100 * REFINED_SHARE:.0f} % of them refined in {REFINEMENT_STEPS} steps"  # of ``synthesize``
FORMS = {
    "float": reports_pb2.MEASURED_FORM_FLOAT,
    "trt": reports_pb2.MEASURED_FORM_ONNX_TRT,
    "ort": reports_pb2.MEASURED_FORM_ONNX_ORT,
}


class JointSource:
    """Joint training in one process: the arithmetic of CoTrain without its servers."""

    wants_gradients = True

    def __init__(self, synthesizer: Synthesizer) -> None:
        self._synthesizer = synthesizer

    def next(self, iteration: int) -> Batch:
        """Draw a batch."""
        drawn = self._synthesizer.draw()
        return Batch(drawn.images, drawn.labels, drawn.logits)

    def answer(self, iteration: int, images: Tensor, logits: Tensor) -> None:
        """Step the generator."""
        self._synthesizer.step(images, logits)

    def save(self) -> str:
        """Return "": a benchmark is not resumed."""
        return ""

    def close(self) -> None:
        """Hold nothing."""


def load(source: Path, folder: Path, normalization: common_pb2.Normalization | None) -> LoadedModel:
    """Load a .pt2; ``normalization``, where given, tells the model what black and white are."""
    store = ArtifactStore((folder / "store").as_uri())
    return load_model(common_pb2.ModelSource(artifact=store.put_file(source), normalization=normalization), store)


@dataclass
class Bench:
    """A model and the labelled images that it is measured on.

    Attributes:
        model: As model intake returns it.
        images: float32 N×C×H×W, preprocessed.
        labels: int64 N.
    """

    model: LoadedModel
    images: Tensor
    labels: Tensor
    folder: Path

    @classmethod
    def open(cls, source: Path, dataset: common_pb2.Dataset, root: Path, folder: Path, *, bounded: bool) -> "Bench":
        """Load a .pt2 and a labelled set; ``bounded`` tells the model what black and white are."""
        given = dataset.preprocessing
        model = load(source, folder, common_pb2.Normalization(mean=given.mean, std=given.std) if bounded else None)
        parts = list(open_dataset(dataset, root, ArtifactStore((folder / "store").as_uri())).images(256))
        images, labels = (torch.from_numpy(np.concatenate(arrays)) for arrays in zip(*parts, strict=True))
        return cls(model, images, labels, folder)

    @cached_property
    def teacher(self) -> fx.GraphModule:
        """The float model, frozen."""
        return no_grad_copy(self.model.module)

    @cached_property
    def teacher_logits(self) -> Tensor:
        """Its logits of all images, N×K."""
        return simulated_logits(self.teacher, self.images)

    def top1(self, logits: Tensor) -> float:
        """Return the accuracy of logits N×K in percent."""
        return float((logits.argmax(1) == self.labels[: len(logits)]).double().mean() * 100)

    def agreement(self, logits: Tensor) -> float:
        """Return how often, in percent, logits N×K choose the float model's class."""
        return float((logits.argmax(1) == self.teacher_logits.argmax(1)[: len(logits)]).double().mean() * 100)

    def simulated(self, student: fx.GraphModule) -> Tensor:
        """Return the fake-quantized student's logits of all images (not an engine's)."""
        with tracking_paused(student):  # these images are the test
            return simulated_logits(student, self.images)

    def exported(self, student: fx.GraphModule, form: str = "trt") -> Tensor:
        """Export a deployable student, run the file with ONNX Runtime, and return its logits of all images."""
        proto = export_trt(to_integer(student), self.model.input_shape)
        return self.run(self.opened(proto if form == "trt" else to_onnx_runtime(proto), form))

    def opened(self, proto: onnx.ModelProto, form: str) -> OnnxModel:
        """Write a graph to "model_{form}.onnx" in the folder, and open it as the evaluator does."""
        path = self.folder / f"model_{form}.onnx"
        path.write_bytes(proto.SerializeToString())
        return OnnxModel(load_graph(path, "onnx"), FORMS[form], torch.get_num_threads(), "onnx")

    def run(self, model: OnnxModel) -> Tensor:
        """Return an opened graph's logits of all images."""
        batch = max(1, min(256, ELEMENTS // self.images[0].numel()))
        return torch.cat([torch.from_numpy(model.run(part.numpy())) for part in self.images.split(batch)])

    def synthesizer(self, batch_size: int, seed: int, *, bounded: bool = True) -> Synthesizer:
        """Return a fresh generator."""
        return Synthesizer(
            no_grad_copy(self.model.module),  # its own: it gets hooks that gather statistics
            self.model.input_shape,
            self.model.num_classes,
            SynthesisParameters(batch_size, seed),
            CPU,
            self.model.pixel_range if bounded else None,
        )

    def synthesize(
        self,
        iterations: int,
        count: int,
        batch_size: int,
        seed: int,
        refined: float = REFINED_SHARE,
        steps: int = REFINEMENT_STEPS,
        *,
        bounded: bool = True,
    ) -> Batch:
        """Train a generator alone and make a set with it, as the Synthesize job does."""
        synthesizer = self.synthesizer(batch_size, seed, bounded=bounded)
        plan = SetPlan.of(count, refined, steps)
        for _ in range(iterations if plan.drawn else 0):
            synthesizer.draw()
            synthesizer.step_alone()
        parts = list(batches_of(synthesizer, plan, lambda: None))
        return Batch(*(torch.cat([getattr(p, name) for p in parts]) for name in ("images", "labels", "logits")))

    def student(self, quantization: Quantization, images: Tensor) -> fx.GraphModule:
        """Return a student with ranges set from synthetic images and no training."""
        student = build_student(self.model.module, quantization, self.model.pixel_range)
        if quantization.deployable:
            calibrate(student, images)
        else:
            simulated_logits(student, images[:512])
        return student

    def train(
        self, student: fx.GraphModule, quantization: Quantization, training: Training, source: BatchSource
    ) -> float:
        """Train a student in place; return the seconds that it took."""
        training = training.for_family(quantization)
        teacher = no_grad_copy(self.model.module) if training.feature_weight else None
        flat = FlatAreas.suiting(training, source, self.model.pixel_range)
        begin = time.monotonic()
        for _ in Trainer(student, training, GeneratorLosses(), source, teacher, flat).run(lambda progress: None):
            pass
        stop_tracking(student)
        return time.monotonic() - begin

    def replay(
        self,
        student: fx.GraphModule,
        quantization: Quantization,
        data: Batch,
        iterations: int,
        batch: int,
        seed: int,
        learning_rate: float | None = None,
    ) -> None:
        """Train a student in place on a set, the rate falling as a cosine; 0 iterations leave it as it is."""
        if not iterations:
            return
        training = Training(
            co_train=False,
            epochs=1,
            iterations_per_epoch=iterations,
            batch_size=batch,
            learning_rate=learning_rate,
            seed=seed,
        )
        self.train(student, quantization, training, ReplaySource(data, batch, seed, CPU))
