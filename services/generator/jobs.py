"""The generator's jobs."""

import math
import time

from granq.v1 import generator_pb2, jobs_pb2, reports_pb2
from services.common.errors import FailedPreconditionError
from services.common.jobs import JobContext
from services.generator.grid import draw_grid
from services.generator.settings import GeneratorSettings
from services.generator.states import FORM, Effort, load_state, save_state
from services.generator.synthesis import SynthesisParameters
from services.generator.synthetic_set import REFINED_SHARE, REFINEMENT_STEPS, SetPlan, write_set
from services.generator.training import create_synthesizer


def synthesize(request: generator_pb2.StartSynthesizeRequest, context: JobContext) -> jobs_pb2.JobResult:
    """Train a generator for a teacher alone, by β·CE(T, y) + γ·L_BNS, and write a synthetic set.

    Resumes from the job's checkpoint; the set then is the same, bit for bit, as without interruption.

    Raises:
        InvalidArgumentError: The model cannot be used.
        FailedPreconditionError: TRAINING_DIVERGED when the losses are no longer finite.
        CancelledError: The job was asked to stop.
    """
    settings: GeneratorSettings = context.settings
    config = request.synthesis
    num_images = config.num_images if config.HasField("num_images") else 1024
    iterations = config.iterations if config.HasField("iterations") else 400
    plan = SetPlan.of(
        num_images,
        config.refined_share if config.HasField("refined_share") else REFINED_SHARE,
        config.refinement_steps if config.HasField("refinement_steps") else REFINEMENT_STEPS,
    )
    if not plan.drawn:
        iterations = 0  # nobody would see what the generator learned
    interval = config.checkpoint_interval if config.HasField("checkpoint_interval") else 100
    parameters = SynthesisParameters.of(
        config.generator, config.batch_size if config.HasField("batch_size") else 32, config.seed
    )
    begin = time.monotonic()
    context.report("loading")
    synthesizer, belongs_to = create_synthesizer(
        request.model, parameters, context.store, settings.synthesis_threads, context.limits
    )
    belongs_to["iterations"] = iterations
    checkpoint = context.load_checkpoint(FORM)
    effort = Effort()
    if checkpoint is not None:
        effort = load_state(context.store, checkpoint, synthesizer, belongs_to)
        begin -= effort.seconds
        context.log.info("synthesis resumed", iteration=synthesizer.iteration)
    started, first = time.monotonic(), synthesizer.iteration
    while synthesizer.iteration < iterations:
        context.check_cancelled()
        batch = synthesizer.draw()
        cross_entropy = synthesizer.step_alone()
        step = synthesizer.iteration
        context.report(
            "synthesis",
            step,
            iterations,
            loss_bn=batch.bn_loss,
            loss_classification=cross_entropy,
            iterations_per_second=(step - first) / max(time.monotonic() - started, 1e-9),
        )
        if step % interval == 0 or step == iterations:
            effort = Effort(time.monotonic() - begin, float(batch.bn_loss))
            _check_finite(effort.bn_loss + float(cross_entropy))
            context.save_checkpoint(save_state(context.store, synthesizer, belongs_to, effort), FORM)

    def on_progress(written: int) -> None:
        context.check_cancelled()
        context.report("drawing", written, num_images)

    written_set = write_set(context.store, synthesizer, plan, on_progress, context.check_cancelled)
    context.report("picturing")
    grid = draw_grid(context.store.local_path(written_set.artifact.digest), synthesizer.generator)
    result = reports_pb2.SynthesisResult(
        dataset=written_set.artifact,
        grid=context.store.put_bytes(grid, name="synthetic_images.png", media_type="image/png"),
        num_images=num_images,
        bn_loss=written_set.bn_loss,
        label_agreement=written_set.label_agreement,
        seconds=time.monotonic() - begin,
    )
    context.log.info(
        "synthesis done", images=num_images, bn_loss=result.bn_loss, label_agreement=result.label_agreement
    )
    return jobs_pb2.JobResult(synthesis=result)


def _check_finite(loss: float) -> None:
    if not math.isfinite(loss):
        raise FailedPreconditionError(
            "the generator's training diverged: its loss is not finite; use a smaller learning_rate",
            reason="TRAINING_DIVERGED",
            field="synthesis.generator.learning_rate",
        )
