"""granq artifacts: files in and out of the store."""

from pathlib import Path
from typing import Annotated

import typer

from granq.cli.session import DEFAULT_ADDRESS, Address, AsJson, connect, console, to_dict, write_json

app = typer.Typer(help="Move files to and from the artifact store.", no_args_is_help=True)


@app.command("put")
def put(
    path: Annotated[Path, typer.Argument(help="File to store.")],
    media_type: Annotated[str, typer.Option(help="IANA media type.")] = "",
    address: Address = DEFAULT_ADDRESS,
    as_json: AsJson = False,
) -> None:
    """Store a file and print its digest; content that is there already is not sent again."""
    from granq.cli.view import transfer_bar

    with connect(address) as client, transfer_bar(console(True), f"upload {path.name}") as progress:
        artifact = client.upload(path, media_type=media_type, progress=progress)
    if as_json:
        write_json(to_dict(artifact))
    else:
        typer.echo(artifact.digest)


@app.command("get")
def get(
    digest: Annotated[str, typer.Argument(help="sha256:… of the artifact.")],
    path: Annotated[Path, typer.Argument(help="File to write, or a folder.")] = Path(),
    address: Address = DEFAULT_ADDRESS,
    as_json: AsJson = False,
) -> None:
    """Fetch an artifact; goes on where an interrupted download stopped, and checks the digest."""
    from granq.cli.view import transfer_bar

    with connect(address) as client, transfer_bar(console(True), "download") as progress:
        written = client.download(digest, path, progress=progress)
    if as_json:
        write_json({"digest": digest, "path": str(written), "size_bytes": written.stat().st_size})
    else:
        typer.echo(str(written))
