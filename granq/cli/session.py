"""What every command shares: the connection, output as text or JSON, and errors as exit codes."""

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from granq.cli.access import access
from granq.cli.exits import Exit, exit_for

if TYPE_CHECKING:
    from google.protobuf.message import Message
    from rich.console import Console

    from granq.client import Client

Address = Annotated[
    str,
    typer.Option(
        "--address",
        envvar="GRANQ_ADDRESS",
        help="Coordinator, as host:port.",
        show_default=True,
        rich_help_panel="Connection and output",
    ),
]
AsJson = Annotated[
    bool,
    typer.Option("--json", help="Write JSON to standard output.", rich_help_panel="Connection and output"),
]
# The same as granq.client.DEFAULT_ADDRESS, whose module takes gRPC along; a test compares the two.
DEFAULT_ADDRESS = "127.0.0.1:50050"
FILE_COLUMNS = 200


class Detached(Exception):  # noqa: N818 - an event, not an error
    """Ctrl-C while something that goes on without the command was being followed; the message tells how to return."""


def console(as_json: bool = False) -> "Console":
    """Return where text for people goes: standard output, or standard error when JSON has that."""
    from rich.console import Console

    console = Console(stderr=as_json, highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = FILE_COLUMNS  # a file or a pipe has no width of its own, and nothing should be cut there
    return console


@contextmanager
def connect(address: str) -> "Iterator[Client]":
    """Open a client; failures that can be expected end the command with their exit code and one sentence.

    Raises:
        typer.Exit: Always in place of a known error.
    """
    from granq.client import Client

    with outcomes(address), Client(address, **access().options()) as client:
        yield client


@contextmanager
def outcomes(address: str = "") -> Iterator[None]:
    """Translate errors into exit codes; an unknown error keeps its traceback, since it is a fault of this program.

    Raises:
        typer.Exit: In place of a known error.
    """
    from granq.errors import GranqClientError

    try:
        yield
    except GranqClientError as error:
        code = exit_for(error.code.name)
        hint = f"no coordinator at {address} ('granq up' starts one): " if code == Exit.UNREACHABLE and address else ""
        _fail(f"{hint}{error}", code)
    except (ValueError, NotADirectoryError, IsADirectoryError) as error:
        _fail(str(error), Exit.USAGE)
    except OSError as error:
        _fail(str(error), Exit.DATA)
    except Detached as left:
        # Whatever else happens on the way out, a second Ctrl-C ends the process at once.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        typer.echo(f"\n{left}", err=True)
        raise typer.Exit(Exit.DETACHED) from None
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        typer.echo("\ninterrupted", err=True)
        raise typer.Exit(Exit.DETACHED) from None


def _fail(text: str, code: Exit) -> None:
    typer.echo(f"granq: {text}", err=True)
    raise typer.Exit(code)


def to_dict(message: "Message") -> dict[str, Any]:
    """Return a message as a dictionary in protobuf's JSON form, with the field names of the protos."""
    from google.protobuf.json_format import MessageToDict

    return MessageToDict(message, preserving_proto_field_name=True)


def write_json(value: Any, *, line: bool = False) -> None:
    """Write one JSON document to standard output: indented, or as one line of JSON Lines."""
    typer.echo(json.dumps(value, indent=None if line else 2, ensure_ascii=False))
    sys.stdout.flush()
