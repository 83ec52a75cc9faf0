"""granq engine: what can be told of an engine without a server."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from granq.cli.exits import Exit
from granq.cli.session import AsJson, outcomes, to_dict, write_json

if TYPE_CHECKING:
    from granq.engines.machine import Machine

app = typer.Typer(help="Look at engine files.", no_args_is_help=True)


@app.callback()
def engine() -> None:
    """Look at engine files; no server is asked."""


@app.command("check")
def check(
    file: Annotated[Path, typer.Argument(help="Engine or manifest; or a bundle, as a file or unpacked.")],
    as_json: AsJson = False,
) -> None:
    """Say whether an engine fits this machine, and why not; 0 if one of a bundle's engines does, else 5."""
    from granq.engines.files import find_engines
    from granq.engines.fit import misfits
    from granq.engines.machine import this_machine

    with outcomes():
        found = find_engines(file)
    machine = this_machine()
    verdicts = [(item, misfits(item.manifest, machine)) for item in found]
    if as_json:
        engines = [
            {"name": item.name, "fits": not reasons, "reasons": reasons, "intact": item.intact}
            | {"manifest": to_dict(item.manifest)}
            for item, reasons in verdicts
        ]
        write_json({"machine": _machine(machine), "engines": engines})
    else:
        typer.echo("this machine: " + ", ".join(f"{key} {value}" for key, value in _machine(machine).items()))
        for item, reasons in verdicts:
            note = " (only its manifest is here)" if item.intact is None else ""
            typer.echo(f"{item.name}: {'does not fit' if reasons else 'fits'}{note}")
            for reason in reasons:
                typer.echo(f"  {reason}")
            if item.intact is False:
                typer.echo("  its content is not what the manifest describes: damaged, or of another build")
    if any(item.intact is False for item in found):
        raise typer.Exit(Exit.DATA)
    if all(reasons for _, reasons in verdicts):
        raise typer.Exit(Exit.REFUSED)


def _machine(machine: "Machine") -> dict[str, str]:
    from granq.engines.fit import NAMES

    gpu = f"{machine.gpu.name} ({machine.gpu.compute_capability})" if machine.gpu else "none"
    versions = {NAMES[runtime]: version for runtime, version in machine.runtimes.items()}
    return {"platform": machine.platform, "GPU": gpu, "driver": machine.driver or "none", **versions}
