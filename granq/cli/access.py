"""What the command shows to servers, given before the subcommand; and granq token, which makes tokens."""

from contextvars import ContextVar
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(help="Make tokens for a principals file.", no_args_is_help=True)
_PANEL = "Transport and access"


class ScopeName(StrEnum):
    """Scopes of a token; the same as services.common.principal.Scope, which the client must not import."""

    READ = "read"
    SUBMIT = "submit"
    SERVICE = "service"
    ADMIN = "admin"


@dataclass(frozen=True)
class Access:
    """Options of the command, as :class:`granq.Client` takes them."""

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    tls: bool = False
    token: str = ""
    token_file: Path | None = None

    def options(self) -> dict[str, Any]:
        """Return keyword arguments for the client."""
        return dict(vars(self))


_given: ContextVar[Access] = ContextVar("granq_access", default=Access())  # noqa: B039 - it is frozen


def set_access(
    ca: Annotated[
        Path | None,
        typer.Option(envvar="GRANQ_CA", help="PEM file with the authorities to trust.", rich_help_panel=_PANEL),
    ] = None,
    certificate: Annotated[
        Path | None,
        typer.Option(envvar="GRANQ_CERTIFICATE", help="PEM file with your own certificate.", rich_help_panel=_PANEL),
    ] = None,
    key: Annotated[
        Path | None, typer.Option(envvar="GRANQ_KEY", help="PEM file with its key.", rich_help_panel=_PANEL)
    ] = None,
    tls: Annotated[
        bool, typer.Option("--tls", help="TLS with the usual authorities, without --ca.", rich_help_panel=_PANEL)
    ] = False,
    token_file: Annotated[
        Path | None,
        typer.Option(
            envvar="GRANQ_TOKEN_FILE", help="File with your token. Or set GRANQ_TOKEN.", rich_help_panel=_PANEL
        ),
    ] = None,
) -> None:
    """Keep the options for the subcommand."""
    import os

    # No option for the token itself: every user of the machine can read command lines.
    token = "" if token_file is not None else os.environ.get("GRANQ_TOKEN", "")
    _given.set(Access(ca, certificate, key, tls, token, token_file))


def access() -> Access:
    """Return what was given to the running command."""
    return _given.get()


@app.command("new")
def new(
    principal: Annotated[str, typer.Argument(help="Whose token it is.")],
    scope: Annotated[
        list[ScopeName] | None, typer.Option(help="What it may do; repeatable. Default: read and submit.")
    ] = None,
) -> None:
    """Make a random token: the lines for the principals file on standard output, the token on standard error."""
    import hashlib
    import re
    import secrets

    from granq.cli.exits import Exit

    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,127}", principal) is None:
        typer.echo(f"granq: {principal!r} is no name: letters, digits and . _ @ - are", err=True)
        raise typer.Exit(Exit.USAGE)
    token = f"granq_{secrets.token_urlsafe(32)}"
    scopes = ", ".join(f'"{name.value}"' for name in scope or (ScopeName.READ, ScopeName.SUBMIT))
    typer.echo("[[credential]]")
    typer.echo(f'principal = "{principal}"\nscopes = [{scopes}]')
    typer.echo(f'token_sha256 = "{hashlib.sha256(token.encode()).hexdigest()}"\n')
    typer.echo(token, err=True)
