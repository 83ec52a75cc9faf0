"""What each stage asks the workers for, made from the pipeline's spec and the results of the stages before.

A job's id is made from the pipeline, the stage and a digest of the request. So a stage that runs again, after a restart
or a retry, attaches to its job or resumes it, while a changed request gets a job of its own.
"""

import hashlib
from dataclasses import dataclass, field

from granq.v1 import common_pb2, coordinator_pb2, evaluator_pb2, generator_pb2, jobs_pb2, quantizer_pb2

Stage = coordinator_pb2.Stage
Granularity = common_pb2.ActivationGranularity

StartRequest = (
    quantizer_pb2.StartInspectRequest
    | generator_pb2.StartSynthesizeRequest
    | quantizer_pb2.StartQuantizeRequest
    | quantizer_pb2.StartExportRequest
    | quantizer_pb2.StartSimulateRequest
    | evaluator_pb2.StartBuildEngineRequest
    | evaluator_pb2.StartEvaluateRequest
)

STAGES: tuple[tuple[int, str], ...] = tuple(
    (number, name.removeprefix("STAGE_").lower()) for name, number in Stage.items() if number != 0
)
"""Number and name of every stage, in the order in which they run."""

NAMES = dict(STAGES)

_SIMULATED = (
    Granularity.ACTIVATION_GRANULARITY_PER_TENSOR,
    Granularity.ACTIVATION_GRANULARITY_PER_SAMPLE_CHANNEL,
)


@dataclass(frozen=True)
class JobCall:
    """One job to start on a worker.

    Attributes:
        worker: "generator", "quantizer" or "evaluator".
        request: Its Start… request, with the key in it; its type says which call it is.
        label: Put before the phases of its progress, where a stage has several jobs; else empty.
        engine: Where it measures an engine, the name of that; else empty. The pipeline goes on when it cannot be done.
    """

    worker: str
    request: StartRequest
    label: str = field(default="")
    engine: str = field(default="")

    @property
    def job_id(self) -> str:
        """Id of the job."""
        return self.request.key.job_id


def simulation_only(spec: coordinator_pb2.PipelineSpec) -> bool:
    """Return whether the granularity has no integer form, so that there is nothing to export."""
    return spec.quantization.activation_granularity in _SIMULATED


def model_of(spec: coordinator_pb2.PipelineSpec) -> common_pb2.ModelSource:
    """Return the model as the workers get it: its normalization is that of the labelled set where it names none."""
    preprocessing = spec.dataset.preprocessing
    if spec.model.HasField("normalization") or not (preprocessing.mean or preprocessing.std):
        return spec.model
    model = common_pb2.ModelSource()
    model.CopyFrom(spec.model)
    model.normalization.CopyFrom(common_pb2.Normalization(mean=preprocessing.mean, std=preprocessing.std))
    return model


def needs_engine(target: common_pb2.EngineTarget) -> bool:
    """Return whether something must be built for a target; ONNX Runtime loads the graph itself."""
    return target.runtime != common_pb2.RUNTIME_ONNXRUNTIME


def applies(stage: int, spec: coordinator_pb2.PipelineSpec) -> bool:
    """Return whether a stage has something to do for this spec."""
    if stage == Stage.STAGE_EXPORT:
        return not simulation_only(spec)
    if stage == Stage.STAGE_BUILD_ENGINES:
        return len(spec.engines) > 0
    return True


def stage_calls(stage: int, pipeline: coordinator_pb2.Pipeline) -> list[JobCall]:
    """Return the jobs of a stage.

    For BUILD_ENGINES these are one for each target that needs an engine, in order; for EVALUATE graphs, each engine
    that was built, then simulation.
    """
    spec, results = pipeline.spec, pipeline.results
    calls: list[JobCall] = []
    match stage:
        case Stage.STAGE_VALIDATE:
            inspect = quantizer_pb2.StartInspectRequest(model=model_of(spec), quantization=spec.quantization)
            calls.append(JobCall("quantizer", inspect))
        case Stage.STAGE_SYNTHESIZE:
            synthesize = generator_pb2.StartSynthesizeRequest(model=model_of(spec))
            if spec.HasField("synthesis"):
                synthesize.synthesis.CopyFrom(spec.synthesis)
            calls.append(JobCall("generator", synthesize))
        case Stage.STAGE_QUANTIZE:
            calls.append(JobCall("quantizer", _quantize(spec, results)))
        case Stage.STAGE_EXPORT:
            export = quantizer_pb2.StartExportRequest(model=model_of(spec), quantized_model=results.quantization.model)
            if spec.dataset.HasField("preprocessing"):
                export.preprocessing.CopyFrom(spec.dataset.preprocessing)
            calls.append(JobCall("quantizer", export))
        case Stage.STAGE_BUILD_ENGINES:
            for number, target in enumerate(spec.engines, 1):
                if not needs_engine(target):
                    continue
                build = evaluator_pb2.StartBuildEngineRequest(onnx_trt=results.export.onnx_trt, target=target)
                parts = [target.name] if target.name else []
                parts += [f"engine {number} of {len(spec.engines)}"] if len(spec.engines) > 1 else []
                label = ", ".join(parts)
                calls.append(JobCall("evaluator", build, label))
        case Stage.STAGE_EVALUATE:
            calls.extend(_evaluations(spec, results))
    for call in calls:
        call.request.key.CopyFrom(_key(pipeline.pipeline_id, stage, call.request, spec.priority))
    return calls


def _quantize(
    spec: coordinator_pb2.PipelineSpec, results: coordinator_pb2.PipelineResults
) -> quantizer_pb2.StartQuantizeRequest:
    request = quantizer_pb2.StartQuantizeRequest(
        model=model_of(spec), quantization=spec.quantization, synthetic_set=results.synthesis.dataset
    )
    if spec.HasField("training"):
        request.training.CopyFrom(spec.training)
    if spec.synthesis.HasField("generator"):
        request.generator.CopyFrom(spec.synthesis.generator)
    return request


def _evaluations(spec: coordinator_pb2.PipelineSpec, results: coordinator_pb2.PipelineResults) -> list[JobCall]:
    calls: list[JobCall] = []
    labelled = spec.HasField("dataset")
    if not simulation_only(spec):
        evaluate = evaluator_pb2.StartEvaluateRequest(
            onnx_float=results.export.onnx_float, onnx_trt=results.export.onnx_trt
        )
        if labelled:
            evaluate.dataset.CopyFrom(spec.dataset)
        else:
            evaluate.synthetic_set.CopyFrom(results.synthesis.dataset)
        engines = [
            (outcome.target.name or str(number), outcome.engine.manifest)
            for number, outcome in enumerate(results.engines, 1)
            if outcome.WhichOneof("outcome") == "engine"
        ]
        graphs = evaluator_pb2.StartEvaluateRequest(onnx_ort=results.export.onnx_ort)
        graphs.MergeFrom(evaluate)
        calls.append(JobCall("evaluator", graphs, "graphs" if labelled or engines else ""))
        for name, manifest in engines:
            measure = evaluator_pb2.StartEvaluateRequest(engine=manifest)
            measure.MergeFrom(evaluate)
            calls.append(JobCall("evaluator", measure, f"engine {name}", engine=name))
    if labelled:
        simulate = quantizer_pb2.StartSimulateRequest(
            model=model_of(spec), quantized_model=results.quantization.model, dataset=spec.dataset
        )
        calls.append(JobCall("quantizer", simulate, "simulation"))
    return calls


def _key(pipeline_id: str, stage: int, request: StartRequest, priority: int) -> jobs_pb2.JobKey:
    content = request.DESCRIPTOR.full_name.encode() + b"\0" + request.SerializeToString(deterministic=True)
    digest = hashlib.sha256(content).hexdigest()[:12]
    return jobs_pb2.JobKey(job_id=f"{pipeline_id}-{NAMES[stage]}-{digest}", pipeline_id=pipeline_id, priority=priority)
