"""Follows a pipeline live, and brings its bundle home when it has ended."""

import time
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Protocol

import typer
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from granq.cli.exits import Exit
from granq.cli.session import Detached, console, to_dict, write_json
from granq.cli.view import describe, stage_name, state_name, transfer_bar
from granq.v1 import coordinator_pb2, jobs_pb2

if TYPE_CHECKING:
    from rich.console import Console

    from granq.client import Client

PLAIN_SECONDS = 10.0
"""Least time between two lines about the same phase where there is no terminal to redraw."""


class Display(Protocol):
    """Something that shows events."""

    def show(self, event: coordinator_pb2.WatchPipelineResponse) -> None:
        """Take the next event."""


def follow(
    client: "Client", pipeline_id: str, after: int = 0, *, as_json: bool = False, print_events: bool = False
) -> coordinator_pb2.Pipeline:
    """Show a pipeline's events until it ends, and return it.

    Args:
        client: The connection.
        pipeline_id: The pipeline.
        after: Events up to this number are left out.
        as_json: Keep standard output free of text.
        print_events: Write each event to standard output as a line of JSON.

    Raises:
        Detached: Ctrl-C; the pipeline goes on.
        granq.GranqClientError: As :meth:`granq.Client.watch`.
    """
    try:
        with _display(console(as_json), as_json) as display:
            for event in client.watch(pipeline_id, after_sequence=after):
                if print_events:
                    write_json({"event": to_dict(event)}, line=True)
                display.show(event)
        return client.get(pipeline_id)
    except KeyboardInterrupt:
        address = "" if client.address == "127.0.0.1:50050" else f" --address {client.address}"
        text = f"pipeline {pipeline_id} goes on; follow it again with: granq pipelines watch {pipeline_id}{address}"
        raise Detached(text) from None


def finish(
    client: "Client",
    pipeline: coordinator_pb2.Pipeline,
    out: Path | None,
    *,
    as_json: bool = False,
    document_line: bool = True,
) -> None:
    """Fetch the bundle, print the outcome, and end with the exit code that says it.

    Args:
        client: The connection.
        pipeline: A pipeline that has ended.
        out: Folder to unpack the bundle into; None leaves it on the server.
        as_json: Write the outcome as JSON instead of text.
        document_line: With JSON, on one line (the last of many) rather than indented.

    Raises:
        typer.Exit: The pipeline did not succeed.
    """
    succeeded = pipeline.state == coordinator_pb2.PIPELINE_STATE_SUCCEEDED
    folder = unpack_bundle(client, pipeline, out, console(True)) if out and succeeded else None
    if as_json:
        document = {"pipeline": to_dict(pipeline), "bundle_dir": str(folder) if folder else None}
        write_json(document, line=document_line)
    else:
        describe(console(), pipeline, folder)
    if not succeeded:
        typer.echo(f"continue it with: granq pipelines retry {pipeline.pipeline_id}", err=True)
        cancelled = pipeline.state == coordinator_pb2.PIPELINE_STATE_CANCELLED
        raise typer.Exit(Exit.CANCELLED if cancelled else Exit.FAILED)


def unpack_bundle(client: "Client", pipeline: coordinator_pb2.Pipeline, out: Path, screen: "Console") -> Path:
    """Download a pipeline's bundle and unpack it into ``out``.

    Raises:
        granq.GranqClientError: DATA_LOSS when the bundle is no zip file, or names a file outside the folder.
    """
    import grpc

    from granq.errors import GranqClientError

    def invalid(text: str) -> GranqClientError:
        return GranqClientError(grpc.StatusCode.DATA_LOSS, f"the bundle {text}", reason="BUNDLE_INVALID")

    out.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".granq-", dir=out) as scratch:
        with transfer_bar(screen, "download bundle") as progress:
            archive = client.download(pipeline.results.bundle, Path(scratch, "bundle.zip"), progress=progress)
        try:
            with zipfile.ZipFile(archive) as bundle:
                for name in bundle.namelist():
                    if not (out / name).resolve().is_relative_to(out.resolve()):
                        raise invalid(f"names a file outside its folder: {name!r}")
                bundle.extractall(out)
        except zipfile.BadZipFile as error:
            raise invalid(f"is no zip file: {error}") from error
    return out


@contextmanager
def _display(screen: "Console", quiet: bool) -> Iterator[Display]:
    if quiet:
        yield _Silence()
    elif screen.is_terminal:
        with bars(screen) as progress:
            yield LiveDisplay(progress)
    else:
        yield PlainDisplay(screen)


def bars(screen: "Console") -> Progress:
    """Return the widget that :class:`LiveDisplay` draws on."""
    columns = (
        TextColumn("{task.description:<14}"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[count]:>11}"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    return Progress(*columns, console=screen)


class _Silence:
    """Shows nothing."""

    def show(self, event: coordinator_pb2.WatchPipelineResponse) -> None:
        """Take the next event."""


class LiveDisplay:
    """One bar for each stage."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[int, TaskID] = {}

    def show(self, event: coordinator_pb2.WatchPipelineResponse) -> None:
        """Move the bar of the event's stage; the stages before it are done."""
        if event.stage == coordinator_pb2.STAGE_UNSPECIFIED:
            return
        if event.stage not in self._tasks:
            self._complete(stage for stage in self._tasks if stage < event.stage)
            self._tasks[event.stage] = self._progress.add_task(stage_name(event.stage), total=None, count="", note="")
        task = self._tasks[event.stage]
        if event.HasField("progress"):
            step, total = event.progress.step, event.progress.total
            count = f"{step}/{total}" if total else ""
            self._progress.update(task, completed=step, total=total or None, count=count, note=note(event.progress))
        if event.HasField("failure"):
            self._progress.update(task, note=event.failure.message)
        if event.state == coordinator_pb2.PIPELINE_STATE_SUCCEEDED:
            self._complete(self._tasks)
        elif event.state in (coordinator_pb2.PIPELINE_STATE_FAILED, coordinator_pb2.PIPELINE_STATE_CANCELLED):
            self._progress.stop_task(task)

    def _complete(self, stages: Iterable[int]) -> None:
        for stage in stages:
            self._progress.update(self._tasks[stage], total=1, completed=1, count="done")


class PlainDisplay:
    """A line at each new state, stage and phase, and now and then between."""

    def __init__(self, screen: "Console") -> None:
        self._screen = screen
        self._printed: dict[tuple[int, int, str], float] = {}
        self._text = ""

    def show(self, event: coordinator_pb2.WatchPipelineResponse) -> None:
        """Print the event if it says something new."""
        key = (event.state, event.stage, event.progress.phase)
        now = time.monotonic()
        final = event.progress.total > 0 and event.progress.step == event.progress.total
        # Phases may run side by side, so that each has its own clock.
        recent = key in self._printed and now - self._printed[key] < PLAIN_SECONDS
        if recent and not final and not event.HasField("failure"):
            return
        self._printed[key] = now
        step = f" {event.progress.step}/{event.progress.total}" if event.progress.total else ""
        stage = f"{stage_name(event.stage)}{step}"
        parts = [state_name(event.state), stage, note(event.progress), event.failure.message]
        text = "  ".join(part for part in parts if part)
        if text != self._text:
            self._screen.print(text, markup=False)
        self._text = text


def note(progress: jobs_pb2.Progress) -> str:
    """Return phase, losses and speed in one short text, such as "training  loss_student 0.41  12.3 it/s"."""
    losses = [f"{name} {value:.4g}" for name, value in sorted(progress.metrics.items()) if "loss" in name]
    speed = progress.metrics.get("iterations_per_second", 0.0)
    parts = [progress.phase, *losses, f"{speed:.1f} it/s" if speed else ""]
    return "  ".join(part for part in parts if part)
