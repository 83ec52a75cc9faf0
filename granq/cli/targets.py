"""granq targets: the devices that are shipped, and the engines that 'granq quantize' asks for."""

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from granq.cli.session import AsJson, console, outcomes, to_dict, write_json

if TYPE_CHECKING:
    from granq.targets import Target
    from granq.v1.common_pb2 import EngineTarget

app = typer.Typer(help="Show the targets that 'granq quantize --target' takes.", no_args_is_help=True)


class Engine(StrEnum):
    """Engines to ask for by their runtime alone."""

    AUTO = "auto"
    TENSORRT = "tensorrt"
    RTX = "rtx"
    NONE = "none"


@app.command("list")
def list_(as_json: AsJson = False) -> None:
    """List the shipped targets."""
    from granq import targets

    found = [targets.load(name) for name in targets.names()]
    if as_json:
        write_json([_document(target) for target in found])
        return
    from rich.table import Table

    table = Table("name", "what it is", "runtime", "sm", "batch", "builds on", box=None, pad_edge=False)
    for target in found:
        engine, batch = target.engine, target.engine.batch
        place = f"{engine.platform or 'any platform'}{', on the device' if _on_device(engine) else ''}"
        table.add_row(
            target.name,
            target.title,
            f"{_runtime(engine)} {engine.runtime_version}".strip(),
            ", ".join(engine.compute_capabilities) or "–",
            f"{batch.min}/{batch.opt}/{batch.max}",
            place,
        )
    console().print(table)


@app.command("show")
def show(
    name: Annotated[str, typer.Argument(help="Name of a shipped target, or a .yaml file.")], as_json: AsJson = False
) -> None:
    """Print a target, to be read or to be the start of another one; its fields are checked."""
    from granq import targets

    with outcomes():
        text = targets.read(name)
        target = targets.parse(text, name)
    if as_json:
        write_json(_document(target))
    else:
        typer.echo(text, nl=False)


def parse_engines(engine: Engine | None, capabilities: list[str], wanted: list[str]) -> "list[EngineTarget]":
    """Return the engines to ask for: those of the named targets, else one of a runtime, or none.

    Args:
        engine: By runtime; None for the default.
        capabilities: Compute capabilities of that one.
        wanted: Names or files of targets.

    Raises:
        ValueError: Options contradict each other, or there is no such target.
        OSError: A target's file cannot be read.
    """
    from granq import specs, targets

    if wanted:
        if engine is not None or capabilities:
            raise ValueError("--target says what to build; leave out --engine and --sm")
        return [target.engine for target in targets.load_all(wanted)]
    if engine is Engine.NONE:
        if capabilities:
            raise ValueError("--sm has no meaning with --engine none")
        return []
    return [specs.engine_target(engine or Engine.AUTO, compute_capabilities=capabilities)]


def _document(target: "Target") -> dict[str, object]:
    engine = to_dict(target.engine)
    return {"name": target.name, "title": target.title, "engine": engine, "notes": list(target.notes)}


def _runtime(engine: "EngineTarget") -> str:
    from granq.v1.common_pb2 import Runtime

    return Runtime.Name(engine.runtime).removeprefix("RUNTIME_").lower()


def _on_device(engine: "EngineTarget") -> bool:
    return _runtime(engine) == "tensorrt"
