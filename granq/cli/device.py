"""granq device: from a package to graphs and an engine, on the machine that will run them."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from granq.cli.session import AsJson, outcomes, to_dict
from granq.cli.targets import Engine, parse_engines

app = typer.Typer(help="Use device packages (.granq); needs no server and no PyTorch.", no_args_is_help=True)
Package = Annotated[Path, typer.Argument(help="Device package, such as model.granq of a bundle.")]


@app.command("build")
def build(
    package: Package,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the files. Default: one beside you, named as the package.")
    ] = None,
    no_engine: Annotated[bool, typer.Option("--no-engine", help="Write the ONNX files alone.")] = False,
    target: Annotated[
        str | None, typer.Option(help="What to build for: a name of 'granq targets list', or a .yaml file.")
    ] = None,
    engine: Annotated[
        Engine | None, typer.Option(help="Engine to build, without --target. Default: auto, if there is a runtime.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Rebuild the ONNX files of a package bit for bit, and build an engine from them here.

    Writes model_trt.onnx, model_ort.onnx and package.json (the manifest, with the preprocessing); and model.engine and
    model.engine.json where TensorRT or TensorRT-RTX is installed.
    """
    arguments = ["build", str(package), "--out", str(out or package.stem)]
    with outcomes():
        if no_engine and (target or engine):
            raise ValueError("--no-engine goes with neither --target nor --engine")
        if target or engine:
            wanted = parse_engines(engine, [], [target] if target else [])
            if wanted:
                arguments += ["--target", json.dumps(to_dict(wanted[0]))]
        if no_engine or engine is Engine.NONE:
            arguments.append("--no-engine")
    _become(arguments, as_json)


@app.command("show")
def show(package: Package, as_json: AsJson = False) -> None:
    """Say what a package holds, after a check of its digest."""
    _become(["show", str(package)], as_json)


def _become(arguments: list[str], as_json: bool) -> NoReturn:
    """Go on as the program that does it. It belongs to the services, which this package does not import."""
    command = [sys.executable, "-P", "-m", "services.evaluator.device_command", *arguments]
    sys.stdout.flush()
    os.execv(sys.executable, [*command, *(["--json"] if as_json else [])])  # noqa: S606 - no shell is wanted
