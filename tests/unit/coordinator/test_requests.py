"""What each stage asks for, and that its job ids depend on nothing but the request."""

import pytest

from granq.v1 import common_pb2, coordinator_pb2, evaluator_pb2, generator_pb2, quantizer_pb2, reports_pb2
from services.coordinator.requests import NAMES, STAGES, Stage, applies, simulation_only, stage_calls
from tests.support.pipelines import artifact, spec


def _pipeline() -> coordinator_pb2.Pipeline:
    pipeline = coordinator_pb2.Pipeline(pipeline_id="p-1", spec=spec())
    pipeline.results.synthesis.dataset.CopyFrom(artifact("b"))
    pipeline.results.quantization.model.CopyFrom(artifact("c"))
    pipeline.results.export.CopyFrom(
        reports_pb2.ExportResult(onnx_trt=artifact("d"), onnx_ort=artifact("e"), onnx_float=artifact("f"))
    )
    return pipeline


def test_stages_are_those_of_the_contract_in_order() -> None:
    names = [name for _number, name in STAGES]
    assert names == ["validate", "synthesize", "quantize", "export", "build_engines", "evaluate", "report"]


def test_job_ids_are_stable_and_follow_the_request() -> None:
    ids = {}
    for number in NAMES:
        for first, second in zip(stage_calls(number, _pipeline()), stage_calls(number, _pipeline()), strict=True):
            assert first == second
            assert first.request.key.pipeline_id == "p-1"
            assert first.job_id.startswith(f"p-1-{NAMES[number]}-")
            ids[first.job_id] = first
    other = _pipeline()
    other.spec.quantization.weight_bits = 3
    assert stage_calls(Stage.STAGE_QUANTIZE, other)[0].job_id not in ids


def test_every_stage_passes_on_what_the_spec_says() -> None:
    pipeline = _pipeline()
    pipeline.spec.training.epochs = 0
    pipeline.spec.synthesis.num_images = 64
    pipeline.spec.synthesis.generator.gamma = 2
    (inspect,) = stage_calls(Stage.STAGE_VALIDATE, pipeline)
    assert isinstance(inspect.request, quantizer_pb2.StartInspectRequest)
    assert inspect.request.quantization == pipeline.spec.quantization
    (synthesize,) = stage_calls(Stage.STAGE_SYNTHESIZE, pipeline)
    assert isinstance(synthesize.request, generator_pb2.StartSynthesizeRequest)
    assert synthesize.worker == "generator"
    assert synthesize.request.synthesis == pipeline.spec.synthesis
    (quantize,) = stage_calls(Stage.STAGE_QUANTIZE, pipeline)
    assert isinstance(quantize.request, quantizer_pb2.StartQuantizeRequest)
    assert quantize.request.training == pipeline.spec.training
    assert quantize.request.generator == pipeline.spec.synthesis.generator
    assert quantize.request.synthetic_set == artifact("b")
    (export,) = stage_calls(Stage.STAGE_EXPORT, pipeline)
    assert isinstance(export.request, quantizer_pb2.StartExportRequest)
    assert export.request.quantized_model == artifact("c")
    assert not export.request.HasField("preprocessing")
    pipeline.spec.dataset.preprocessing.pad = 2
    (export,) = stage_calls(Stage.STAGE_EXPORT, pipeline)
    assert isinstance(export.request, quantizer_pb2.StartExportRequest)
    assert export.request.preprocessing == common_pb2.Preprocessing(pad=2)


def test_normalization_is_that_of_the_labelled_set_unless_the_model_names_its_own() -> None:
    pipeline = _pipeline()
    preprocessing = pipeline.spec.dataset.preprocessing
    del preprocessing.mean[:], preprocessing.std[:]
    for number in (Stage.STAGE_VALIDATE, Stage.STAGE_SYNTHESIZE, Stage.STAGE_QUANTIZE, Stage.STAGE_EXPORT):
        (call,) = stage_calls(number, pipeline)
        assert not call.request.model.HasField("normalization")  # type: ignore[union-attr]
        preprocessing.mean.append(0.4)
        preprocessing.std.append(0.2)
        (call,) = stage_calls(number, pipeline)
        assert call.request.model.normalization == common_pb2.Normalization(mean=[0.4], std=[0.2])  # type: ignore[union-attr]
        pipeline.spec.model.normalization.mean.append(0.7)
        (call,) = stage_calls(number, pipeline)
        assert call.request.model.normalization == common_pb2.Normalization(mean=[0.7])  # type: ignore[union-attr]
        pipeline.spec.model.ClearField("normalization")
        del preprocessing.mean[:], preprocessing.std[:]
    assert not pipeline.spec.model.HasField("normalization")


def test_engines_are_built_from_the_trt_graph_one_per_target() -> None:
    pipeline = _pipeline()
    assert not applies(Stage.STAGE_BUILD_ENGINES, pipeline.spec)
    for runtime in (common_pb2.RUNTIME_TENSORRT, common_pb2.RUNTIME_TENSORRT_RTX):
        pipeline.spec.engines.add(runtime=runtime)
    assert applies(Stage.STAGE_BUILD_ENGINES, pipeline.spec)
    calls = stage_calls(Stage.STAGE_BUILD_ENGINES, pipeline)
    assert [call.label for call in calls] == ["engine 1 of 2", "engine 2 of 2"]
    for call, target in zip(calls, pipeline.spec.engines, strict=True):
        assert isinstance(call.request, evaluator_pb2.StartBuildEngineRequest)
        assert (call.request.onnx_trt, call.request.target) == (artifact("d"), target)
    pipeline.spec.engines.add(runtime=common_pb2.RUNTIME_ONNXRUNTIME, name="cpu")
    pipeline.spec.engines.add(name="rtx-ada")
    calls = stage_calls(Stage.STAGE_BUILD_ENGINES, pipeline)
    assert [call.label for call in calls] == ["engine 1 of 4", "engine 2 of 4", "rtx-ada, engine 4 of 4"]


def test_engines_that_were_built_are_measured_each_by_itself() -> None:
    pipeline = _pipeline()
    for name in ("", "jetson-orin-nano", "rtx-ada"):
        pipeline.results.engines.add(target=common_pb2.EngineTarget(name=name))
    pipeline.results.engines[0].engine.manifest.runtime = common_pb2.RUNTIME_TENSORRT
    pipeline.results.engines[1].failure.reason = "TARGET_ELSEWHERE"
    pipeline.results.engines[2].engine.manifest.runtime = common_pb2.RUNTIME_TENSORRT_RTX
    calls = stage_calls(Stage.STAGE_EVALUATE, pipeline)
    assert [(call.label, call.engine) for call in calls] == [
        ("graphs", ""),
        ("engine 1", "1"),
        ("engine rtx-ada", "rtx-ada"),
    ]
    graphs, first, second = (call.request for call in calls)
    assert isinstance(graphs, evaluator_pb2.StartEvaluateRequest)
    assert isinstance(first, evaluator_pb2.StartEvaluateRequest)
    assert isinstance(second, evaluator_pb2.StartEvaluateRequest)
    assert (graphs.HasField("engine"), graphs.onnx_ort) == (False, artifact("e"))
    for request, number in ((first, 0), (second, 2)):
        assert request.engine == pipeline.results.engines[number].engine.manifest
        assert (request.onnx_float, request.onnx_trt) == (artifact("f"), artifact("d"))
        assert not request.HasField("onnx_ort")
        assert request.WhichOneof("data") == "synthetic_set"
    assert len({call.job_id for call in calls}) == 3


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("simulated", [False, True])
def test_evaluation_asks_whom_it_must(labelled: bool, simulated: bool) -> None:
    pipeline = _pipeline()
    if labelled:
        pipeline.spec.dataset.CopyFrom(common_pb2.Dataset(path="fashion", format=common_pb2.DATASET_FORMAT_IDX))
    if simulated:
        granularity = common_pb2.ACTIVATION_GRANULARITY_PER_SAMPLE_CHANNEL
        pipeline.spec.quantization.activation_granularity = granularity
    assert simulation_only(pipeline.spec) == simulated
    assert applies(Stage.STAGE_EXPORT, pipeline.spec) != simulated
    asked = {call.worker: call.request for call in stage_calls(Stage.STAGE_EVALUATE, pipeline)}
    assert set(asked) == ({"evaluator"} if not simulated else set()) | ({"quantizer"} if labelled else set())
    graphs = asked.get("evaluator")
    if isinstance(graphs, evaluator_pb2.StartEvaluateRequest):
        assert graphs.WhichOneof("data") == ("dataset" if labelled else "synthetic_set")
        assert (graphs.onnx_float, graphs.onnx_trt, graphs.onnx_ort) == (artifact("f"), artifact("d"), artifact("e"))
