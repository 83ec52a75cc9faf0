"""granq pipelines: list, show, watch, cancel, retry, delete."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from granq.cli.session import DEFAULT_ADDRESS, Address, AsJson, connect, console, to_dict, write_json

app = typer.Typer(help="See and steer pipelines.", no_args_is_help=True)
PipelineId = Annotated[str, typer.Argument(help="Id of the pipeline.")]


class State(StrEnum):
    """States to filter by."""

    QUEUED = "queued"
    RUNNING = "running"
    CANCELLING = "cancelling"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


@app.command("list")
def list_pipelines(
    state: Annotated[list[State] | None, typer.Option(help="Only these states; repeatable.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many, the newest.")] = 50,
    address: Address = DEFAULT_ADDRESS,
    as_json: AsJson = False,
) -> None:
    """List pipelines, newest first."""
    from itertools import islice

    from granq.cli.view import pipelines_table

    states = [f"PIPELINE_STATE_{s.name}" for s in state or ()]
    with connect(address) as client:
        found = list(islice(client.list(states=states, page_size=min(limit, 1000)), limit))
    if as_json:
        write_json([to_dict(pipeline) for pipeline in found])
    else:
        console().print(pipelines_table(found))


@app.command("show")
def show(pipeline_id: PipelineId, address: Address = DEFAULT_ADDRESS, as_json: AsJson = False) -> None:
    """Show one pipeline and what it has measured so far."""
    from granq.cli.view import describe

    with connect(address) as client:
        pipeline = client.get(pipeline_id)
    if as_json:
        write_json(to_dict(pipeline))
    else:
        describe(console(), pipeline)


@app.command("watch")
def watch(
    pipeline_id: PipelineId,
    after: Annotated[int, typer.Option(min=0, help="Leave out events up to this number.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder for the bundle, once the pipeline has succeeded.")] = None,
    address: Address = DEFAULT_ADDRESS,
    as_json: AsJson = False,
) -> None:
    """Follow a pipeline until it ends; Ctrl-C leaves it running. With --json, one event a line."""
    from granq.cli.follow import finish, follow

    with connect(address) as client:
        pipeline = follow(client, pipeline_id, after, as_json=as_json, print_events=as_json)
        finish(client, pipeline, out, as_json=as_json)


@app.command("cancel")
def cancel(
    pipeline_id: PipelineId,
    wait: Annotated[bool, typer.Option("--wait", help="Return when it has ended.")] = False,
    address: Address = DEFAULT_ADDRESS,
    as_json: AsJson = False,
) -> None:
    """Stop a pipeline; it can be continued with retry."""
    with connect(address) as client:
        pipeline = client.cancel(pipeline_id)
        if wait:
            pipeline = client.wait(pipeline_id)
    _answer(pipeline_id, pipeline.state, to_dict(pipeline) if as_json else None)


@app.command("retry")
def retry(pipeline_id: PipelineId, address: Address = DEFAULT_ADDRESS, as_json: AsJson = False) -> None:
    """Continue a failed or cancelled pipeline where it stopped."""
    with connect(address) as client:
        pipeline = client.retry(pipeline_id)
    _answer(pipeline_id, pipeline.state, to_dict(pipeline) if as_json else None)


@app.command("delete")
def delete(pipeline_id: PipelineId, address: Address = DEFAULT_ADDRESS, as_json: AsJson = False) -> None:
    """Remove a pipeline that has ended."""
    with connect(address) as client:
        client.delete(pipeline_id)
    if as_json:
        write_json({"pipeline_id": pipeline_id, "deleted": True})
    else:
        typer.echo(f"{pipeline_id} deleted")


def _answer(pipeline_id: str, state: int, document: dict[str, object] | None) -> None:
    from granq.cli.view import state_name

    if document is not None:
        write_json(document)
    else:
        typer.echo(f"{pipeline_id} {state_name(state)}")
