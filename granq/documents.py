"""YAML documents that are shipped with the package or a user's own: recipes and targets are such."""

import difflib
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

SUFFIXES = (".yaml", ".yml")


def names(package: str) -> list[str]:
    """Return the documents below a package without their suffix, such as "deployable/default"."""
    found: list[str] = []
    pending = [(files(package), "")]
    while pending:
        folder, path = pending.pop()
        for entry in folder.iterdir():
            if entry.is_dir():
                pending.append((entry, f"{path}{entry.name}/"))
            elif entry.name.endswith(SUFFIXES[0]):
                found.append(f"{path}{entry.name.removesuffix(SUFFIXES[0])}")
    return sorted(found)


def read(package: str, kind: str, name: str, known: Sequence[str]) -> str:
    """Return the text of a document: a file if the name ends with .yaml or .yml, else a shipped one.

    Args:
        package: Where the shipped ones are.
        kind: What they are called, such as "recipe".
        name: Which one.
        known: Names of those that are shipped.

    Raises:
        ValueError: None of that name is shipped, or the file is not UTF-8.
        OSError: The file cannot be read.
    """
    if name.endswith(SUFFIXES):
        return Path(name).read_text("utf-8")
    if name not in known:
        close = difflib.get_close_matches(name, known, 3, 0.4)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise ValueError(f"no {kind} {name!r} ('granq {kind}s list' shows them; a file ends with .yaml){hint}")
    return files(package).joinpath(*f"{name}{SUFFIXES[0]}".split("/")).read_text("utf-8")
