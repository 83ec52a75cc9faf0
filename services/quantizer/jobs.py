"""The quantizer's jobs. Each runs in a process of its own; ``request`` is the message of the call that started it."""

import math
import time
from collections.abc import Callable

import torch

from granq.v1 import artifacts_pb2, common_pb2, jobs_pb2, packages_pb2, quantizer_pb2, reports_pb2
from services.common.datasets import dataset_artifact, open_dataset
from services.common.errors import FailedPreconditionError, InternalError, InvalidArgumentError, UnavailableError
from services.common.jobs import JobContext
from services.common.models.loading import LoadedModel, load_model, summarize
from services.common.onnx_runtime_flavour import to_onnx_runtime
from services.common.package import MEDIA_TYPE, write_package
from services.quantizer import diagnostics, picture
from services.quantizer.batches import BatchSource, ReplaySource, SyntheticSet, read_synthetic_set
from services.quantizer.calibrate import calibrate
from services.quantizer.checkpoint import (
    FORM,
    Checkpoint,
    load_checkpoint,
    load_student,
    save_checkpoint,
    save_student,
)
from services.quantizer.config import GeneratorLosses, Quantization, Training
from services.quantizer.flat_areas import FlatAreas
from services.quantizer.generator_client import CoTrainSource, opening
from services.quantizer.integer import float_operations, integer_layers, is_exact, packed_bytes, to_integer
from services.quantizer.onnx_export import OPSET, export_float, export_trt
from services.quantizer.rank_process import device_of, further_ranks
from services.quantizer.settings import QuantizerSettings
from services.quantizer.student import build_student, no_grad_copy, simulated_logits, stop_tracking
from services.quantizer.training import Progress, Trainer

_ONNX = "application/onnx"
SIMULATED_BATCH = 64


def prepare(settings: QuantizerSettings) -> torch.device:
    """Set PyTorch up so that a run can be repeated bit for bit, and return the device to compute on."""
    if settings.torch_threads:
        torch.set_num_threads(settings.torch_threads)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    name = settings.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name != "cpu" and not torch.cuda.is_available():
        raise FailedPreconditionError(
            f"device {name!r} was configured, but PyTorch sees no CUDA device", reason="NO_CUDA"
        )
    return torch.device(name)


def inspect(request: quantizer_pb2.StartInspectRequest, context: JobContext) -> jobs_pb2.JobResult:
    """Read a model, try the quantization on its graph, and return the model's summary."""
    prepare(context.settings)
    context.report("loading")
    with context.reading("model.artifact", request.model.artifact):
        model = load_model(request.model, context.store)
    if request.HasField("quantization"):
        context.report("checking")
        build_student(model.module, Quantization.from_proto(request.quantization))
    return jobs_pb2.JobResult(inspection=summarize(model))


def quantize(request: quantizer_pb2.StartQuantizeRequest, context: JobContext) -> jobs_pb2.JobResult:
    """Calibrate and train a student, from the last checkpoint if there is one, and store it."""
    started = time.monotonic()
    device = device_of(0, context.settings.ranks, prepare(context.settings))
    quantization = Quantization.from_proto(request.quantization)
    training = Training.from_proto(request.training).for_family(quantization)
    losses = GeneratorLosses.from_proto(request.generator)
    context.report("loading")
    with context.reading("model.artifact", request.model.artifact):
        model = load_model(request.model, context.store)
    with context.reading("synthetic_set", request.synthetic_set):
        images = read_synthetic_set(
            context.store.local_path(request.synthetic_set.digest), model.input_shape, model.num_classes
        )
    student = build_student(model.module, quantization, model.pixel_range).to(device)
    teacher = no_grad_copy(model.module).to(device)
    stored = context.load_checkpoint(FORM)
    if stored is not None:
        checkpoint = load_checkpoint(context.store.local_path(stored.digest))
        context.log.info("resuming", iteration=checkpoint.iteration)
    else:
        context.report("calibrating")
        set_ranges(student, quantization, images, device)
        before = diagnostics.measure(teacher, student, images.held_out.images, context.check_cancelled)
        checkpoint = Checkpoint({}, 0, "", 0.0, before)
    source = _open_source(request, training, images, context, device, checkpoint.generator)
    try:
        flat = FlatAreas.suiting(training, source, model.pixel_range)
        followed = teacher if training.feature_weight else None
        narrow = context.settings.bfloat16 and not quantization.deployable
        trainer = Trainer(student, training, losses, source, followed, flat, bfloat16=narrow)
        if checkpoint.tensors:
            trainer.load_state(checkpoint.tensors, checkpoint.iteration)
        with further_ranks(trainer, request, context, device):
            _train(trainer, context, lambda: checkpoint.seconds + time.monotonic() - started, checkpoint.before)
    except InvalidArgumentError as error:
        if not checkpoint.generator or error.reason not in ("STATE_MISMATCH", "STATE_INVALID"):
            raise
        context.drop_checkpoint(error.message)
        raise UnavailableError(
            f"the generator cannot go on from the last checkpoint, so the training begins anew: {error.message}",
            reason="CHECKPOINT_REFUSED",
        ) from error
    except FloatingPointError as error:
        raise InternalError(f"training diverged: {error}", reason="TRAINING_DIVERGED") from error
    finally:
        source.close()
    stop_tracking(student)
    context.report("measuring")
    held_out = images.held_out
    agreement = simulated_logits(student, held_out.images.to(device)).argmax(1).cpu() == held_out.logits.argmax(1)
    after = diagnostics.measure(teacher, student, held_out.images, context.check_cancelled)
    found = diagnostics.summary(trainer, len(held_out.images), checkpoint.before, after, source.wants_gradients)
    result = reports_pb2.QuantizationResult(
        model=save_student(context.store, student, quantization, request.model.artifact.digest, model.pixel_range),
        iterations=trainer.iteration,
        teacher_agreement=float(agreement.float().mean()),
        seconds=checkpoint.seconds + time.monotonic() - started,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        diagnostics=context.store.put_bytes(diagnostics.to_json(found), "diagnostics.json", "application/json"),
        diagnostics_picture=context.store.put_bytes(picture.draw(found), "diagnostics.png", "image/png"),
    )
    if training.iterations:
        result.loss = trainer.last_epoch_loss
    return jobs_pb2.JobResult(quantization=result)


def set_ranges(
    student: torch.nn.Module, quantization: Quantization, images: SyntheticSet, device: torch.device
) -> None:
    """Give a new student its first ranges from the synthetic training images."""
    if quantization.deployable:
        calibrate(student, images.train.images.to(device))
    else:
        # Moving ranges start from a few batches; dynamic ones need nothing, and the pass is cheap.
        simulated_logits(student, images.train.images[:512].to(device))


def _open_source(
    request: quantizer_pb2.StartQuantizeRequest,
    training: Training,
    images: SyntheticSet,
    context: JobContext,
    device: torch.device,
    generator_state: str,
) -> BatchSource:
    if not training.co_train or not training.iterations:
        return ReplaySource(images.train, training.batch_size, training.seed, device)
    context.report("connecting")
    key = jobs_pb2.JobKey(job_id=context.job_id, pipeline_id=context.pipeline_id)
    message = opening(
        request.model, request.generator, training.batch_size, training.seed, key, resume_from=generator_state
    )
    return CoTrainSource(context.settings.generator_address, context.settings, message, device)


def _train(trainer: Trainer, context: JobContext, seconds: Callable[[], float], before: diagnostics.Layers) -> None:
    total = trainer.training.iterations

    def report(progress: Progress) -> None:
        warm = progress.iteration <= trainer.training.warmup_iterations
        figures = {
            "loss_student": progress.student,
            "iterations_per_second": progress.iterations_per_second,
            "agreement": progress.agreement,
        }
        if trainer.source.wants_gradients:
            figures["loss_generator"] = progress.generator
        context.report("warm-up" if warm else "training", progress.iteration, total, **figures)

    for iteration in trainer.run(report):
        context.check_cancelled()
        if iteration % trainer.training.checkpoint_interval == 0 and iteration < total:
            saved = save_checkpoint(context.store, trainer, seconds(), before)
            context.save_checkpoint(saved.artifact, FORM, (saved.generator,) if saved.generator else ())


def simulate(request: quantizer_pb2.StartSimulateRequest, context: JobContext) -> jobs_pb2.JobResult:
    """Measure the fake-quantized student on a labelled set."""
    device = prepare(context.settings)
    context.report("loading")
    model, student, _ = _load_quantized(request.model, request.quantized_model.digest, context)
    student.to(device)
    with context.reading("dataset", dataset_artifact(request.dataset)):
        dataset = open_dataset(request.dataset, context.settings.dataset_root, context.store)
    batch_bytes = 4 * SIMULATED_BATCH * math.prod(model.input_shape)
    with context.limits("dataset", batch_bytes):
        dataset.require(model.input_shape, model.num_classes)
    seen = top1 = top5 = 0
    with torch.no_grad():
        for images, labels in context.reading_each("dataset", dataset.images(SIMULATED_BATCH), batch_bytes):
            context.check_cancelled()
            logits = student(torch.from_numpy(images).to(device)).cpu()
            ranked = logits.topk(min(5, model.num_classes)).indices == torch.from_numpy(labels)[:, None]
            seen, top1, top5 = seen + len(labels), top1 + int(ranked[:, 0].sum()), top5 + int(ranked.sum())
            context.report("simulating", seen, len(dataset))
    accuracy = reports_pb2.Accuracy(images=seen, top1=100 * top1 / seen)
    if model.num_classes >= 6:
        accuracy.top5 = 100 * top5 / seen
    measurement = reports_pb2.Measurement(
        form=reports_pb2.MEASURED_FORM_SIMULATED,
        accuracy=accuracy,
        runtime=f"torch {torch.__version__}",
        device=str(device),
    )
    return jobs_pb2.JobResult(
        evaluation=reports_pb2.EvaluationResult(measurements=[measurement], dataset=dataset.description)
    )


def _load_quantized(
    source: common_pb2.ModelSource, digest: str, context: JobContext
) -> tuple[LoadedModel, torch.fx.GraphModule, Quantization]:
    with context.reading("model.artifact", source.artifact):
        model = load_model(source, context.store)
    with context.reading("quantized_model", artifacts_pb2.Artifact(digest=digest)):
        student, quantization = load_student(context.store.local_path(digest), model.module, source.artifact.digest)
    return model, student, quantization


def export(request: quantizer_pb2.StartExportRequest, context: JobContext) -> jobs_pb2.JobResult:
    """Write the two quantized ONNX files, the device package that holds them, and the float ONNX file."""
    prepare(context.settings)
    context.report("loading", 0, 5)
    model, student, quantization = _load_quantized(request.model, request.quantized_model.digest, context)
    if not quantization.deployable:
        raise FailedPreconditionError(
            f"{quantization.activation_granularity.name} activations have dynamic ranges, which no integer engine "
            "runs; quantize with PER_CHANNEL to export",
            reason="SIMULATION_ONLY",
            field="quantized_model",
        )
    integer = to_integer(student)
    context.report("exporting for TensorRT", 1, 5)
    trt = export_trt(integer, model.input_shape)
    context.check_cancelled()
    context.report("exporting for ONNX Runtime", 2, 5)
    files = {"trt": trt.SerializeToString(), "ort": to_onnx_runtime(trt).SerializeToString()}
    context.report("packing for devices", 3, 5)
    about = packages_pb2.PackageManifest(
        model_name=request.model.architecture or request.model.artifact.name,
        input_shape=model.input_shape,
        num_classes=model.num_classes,
        layers=layer_reports(integer),
    )
    if request.HasField("preprocessing"):
        about.preprocessing.CopyFrom(request.preprocessing)
    elif request.model.HasField("normalization"):
        known = request.model.normalization
        about.preprocessing.CopyFrom(common_pb2.Preprocessing(mean=known.mean, std=known.std))
    package = write_package(files["trt"], files["ort"], about)
    context.check_cancelled()
    context.report("exporting the float model", 4, 5)
    files["float"] = export_float(model.module, model.input_shape).SerializeToString()
    context.check_cancelled()
    artifacts = {
        name: context.store.put_bytes(data, name=f"model_{name}.onnx", media_type=_ONNX) for name, data in files.items()
    }
    return jobs_pb2.JobResult(
        export=reports_pb2.ExportResult(
            onnx_trt=artifacts["trt"],
            onnx_ort=artifacts["ort"],
            onnx_float=artifacts["float"],
            package=context.store.put_bytes(package, name="model.granq", media_type=MEDIA_TYPE),
            layers=about.layers,
            float_operations=float_operations(integer),
            opset=OPSET,
            exact=is_exact(integer),
            packed_bytes=packed_bytes(integer),
        )
    )


def layer_reports(integer: torch.fx.GraphModule) -> list[reports_pb2.LayerQuantization]:
    """Return how each layer of an integer form is quantized, in order of execution."""
    return [
        reports_pb2.LayerQuantization(
            name=name,
            weight_bits=layer.bits.weight,
            activation_bits=layer.bits.activation,
            activation_signed=layer.input_range.signed,
            input_scale_folded=folded,
            accumulator_bound=layer.accumulator_bound,
        )
        for name, layer, folded in integer_layers(integer)
    ]
