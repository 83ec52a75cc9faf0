"""How progress looks: bars on a terminal, lines elsewhere."""

import io

import pytest
from rich.console import Console

from granq.cli.follow import LiveDisplay, PlainDisplay, bars, note
from granq.cli.view import describe, size
from granq.v1 import common_pb2, coordinator_pb2, jobs_pb2, reports_pb2


def event(
    stage: coordinator_pb2.Stage,
    step: int,
    total: int,
    phase: str = "training",
    state: coordinator_pb2.PipelineState = coordinator_pb2.PIPELINE_STATE_RUNNING,
) -> coordinator_pb2.WatchPipelineResponse:
    progress = jobs_pb2.Progress(phase=phase, step=step, total=total, metrics={"loss_student": 0.5})
    return coordinator_pb2.WatchPipelineResponse(state=state, stage=stage, progress=progress)


def screen() -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    return Console(file=stream, width=120, force_terminal=False, highlight=False), stream


def test_note_has_losses_and_speed() -> None:
    progress = jobs_pb2.Progress(phase="training", metrics={"loss_bn": 1.25, "iterations_per_second": 9.96, "lr": 0.1})
    assert note(progress) == "training  loss_bn 1.25  10.0 it/s"


def test_lines_are_few() -> None:
    console, stream = screen()
    display = PlainDisplay(console)
    for step in range(1, 101):
        display.show(event(coordinator_pb2.STAGE_QUANTIZE, step, 100))
    display.show(event(coordinator_pb2.STAGE_EXPORT, 0, 0, phase="exporting"))
    lines = stream.getvalue().splitlines()
    assert lines[0] == "RUNNING  quantize 1/100  training  loss_student 0.5"
    assert lines[-2].startswith("RUNNING  quantize 100/100")
    assert lines[-1].startswith("RUNNING  export  exporting")
    assert len(lines) == 3


def test_bars_of_earlier_stages_are_complete() -> None:
    console, _ = screen()
    progress = bars(console)
    display = LiveDisplay(progress)
    display.show(event(coordinator_pb2.STAGE_SYNTHESIZE, 7, 8))
    display.show(event(coordinator_pb2.STAGE_QUANTIZE, 20, 100))
    synthesize, quantize = progress.tasks
    assert synthesize.finished
    assert (quantize.completed, quantize.total, quantize.fields["count"]) == (20, 100, "20/100")
    display.show(
        event(coordinator_pb2.STAGE_REPORT, 1, 1, state=coordinator_pb2.PIPELINE_STATE_SUCCEEDED),
    )
    assert all(task.finished for task in progress.tasks)


def test_an_engine_is_described_by_size_and_target() -> None:
    pipeline = coordinator_pb2.Pipeline(pipeline_id="p", state=coordinator_pb2.PIPELINE_STATE_SUCCEEDED)
    manifest = pipeline.results.engines.add().engine.manifest
    manifest.engine.digest, manifest.engine.size_bytes = "sha256:abc", 3 * 1024 * 1024
    manifest.runtime, manifest.runtime_version = common_pb2.RUNTIME_TENSORRT_RTX, "1.7"
    manifest.platform = "linux-x86_64"
    manifest.compute_capabilities.append("8.9")
    console, stream = screen()
    describe(console, pipeline)
    assert "engine: sha256:abc, 3.0 MiB, TensorRT-RTX 1.7 for sm 8.9, linux-x86_64" in stream.getvalue()


def test_targets_without_an_engine_and_engines_that_did_not_run_are_told() -> None:
    pipeline = coordinator_pb2.Pipeline(pipeline_id="p", state=coordinator_pb2.PIPELINE_STATE_SUCCEEDED)
    results = pipeline.results
    results.engines.add(target=common_pb2.EngineTarget(name="cpu")).graph.digest = "sha256:abc"
    results.engines.add(target=common_pb2.EngineTarget(name="l4")).failure.message = "build on an L4"
    results.evaluation.unmeasured.add(target="rtx-ada", failure=common_pb2.Failure(message="no GPU"))
    row = results.evaluation.measurements.add(form=reports_pb2.MEASURED_FORM_ENGINE, target="h100")
    row.accuracy.images = 10
    console, stream = screen()
    describe(console, pipeline)
    for text in (
        "engine: none needed for cpu; it loads sha256:abc",
        "engine: none for l4: build on an L4",
        "engine rtx-ada was built and not run: no GPU",
        "engine h100",
    ):
        assert text in stream.getvalue()


@pytest.mark.parametrize(("runtime", "said"), [("torch 2.14", " (torch 2.14)"), ("", "")])
def test_a_simulation_says_what_ran_it_where_that_is_known(runtime: str, said: str) -> None:
    pipeline = coordinator_pb2.Pipeline()
    pipeline.results.evaluation.measurements.add(form=reports_pb2.MEASURED_FORM_SIMULATED, runtime=runtime)
    console, stream = screen()
    describe(console, pipeline)
    assert f"fake quantization in PyTorch{said}, which" in stream.getvalue()


def test_sizes() -> None:
    assert [size(n) for n in (0, 1023, 1536, 5 * 1024**3)] == ["0 B", "1023 B", "1.5 KiB", "5.0 GiB"]
