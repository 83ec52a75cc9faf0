"""Puts the commands together."""

import typer

from granq.cli import access, artifacts, device, devices, engines, pipelines, quantize, recipes, targets, up
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
        # Plain help: rich's, with the Markdown parser that it brings along, takes as long as all the rest.
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(access.set_access)
    app.command("up", epilog=EPILOG, short_help="Start all four servers here; they run until Ctrl-C.")(up.up)
    app.command("quantize", epilog=EPILOG)(quantize.quantize)
    app.add_typer(pipelines.app, name="pipelines")
    app.add_typer(artifacts.app, name="artifacts")
    app.add_typer(recipes.app, name="recipes")
    app.add_typer(targets.app, name="targets")
    app.add_typer(engines.app, name="engine")
    app.add_typer(device.app, name="device")
    app.add_typer(devices.app, name="devices")
    app.add_typer(access.app, name="token")
    return app
