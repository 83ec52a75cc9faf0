"""Puts the commands together."""

import typer

from granq.cli import artifacts, device, devices, engines, pipelines, quantize, recipes, targets, up
from granq.cli.exits import EPILOG


def build() -> typer.Typer:
    """Return the command with its subcommands."""
    app = typer.Typer(
        name="granq",
        help="Zero-shot quantization as a service: a pretrained CNN in; a low-bit model, its engine and a report out.",
        epilog=EPILOG,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.command("up", epilog=EPILOG)(up.up)
    app.command("quantize", epilog=EPILOG)(quantize.quantize)
    app.add_typer(pipelines.app, name="pipelines")
    app.add_typer(artifacts.app, name="artifacts")
    app.add_typer(recipes.app, name="recipes")
    app.add_typer(targets.app, name="targets")
    app.add_typer(engines.app, name="engine")
    app.add_typer(device.app, name="device")
    app.add_typer(devices.app, name="devices")
    return app
