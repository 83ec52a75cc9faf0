"""The granq command. Everything heavier than an import of this file waits until a command needs it."""

import sys

from granq.cli.exits import Exit

MISSING = "the granq command needs the extra 'cli' ({name} is missing): pip install 'granq-pipeline[cli]'"


def main() -> None:
    """Run the granq command; the entry point of the installation."""
    try:
        from granq.cli.app import build
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in ("typer", "rich"):
            raise
        sys.stderr.write(MISSING.format(name=error.name) + "\n")
        sys.exit(Exit.USAGE)
    build()()
