"""granq recipes: the settings that are shipped."""

from typing import Annotated

import typer

from granq.cli.session import AsJson, console, outcomes, to_dict, write_json

app = typer.Typer(help="Show the recipes that 'granq quantize --recipe' takes.", no_args_is_help=True)


@app.command("list")
def list_(as_json: AsJson = False) -> None:
    """List the shipped recipes."""
    from granq import recipes

    found = {name: recipes.summary(recipes.read(name)) for name in recipes.names()}
    if as_json:
        write_json([{"name": name, "summary": summary} for name, summary in found.items()])
        return
    from rich.table import Table

    table = Table("name", "what it is", box=None, pad_edge=False)
    for name, summary in found.items():
        table.add_row(name, summary)
    console().print(table)


@app.command("show")
def show(
    name: Annotated[str, typer.Argument(help="Name of a shipped recipe, or a .yaml file.")], as_json: AsJson = False
) -> None:
    """Print a recipe, to be read or to be the start of another one; its fields are checked."""
    from granq import recipes

    with outcomes():
        text = recipes.read(name)
        spec = recipes.parse(text, name)
    if as_json:
        write_json(to_dict(spec))
    else:
        typer.echo(text, nl=False)
