"""Result tables: Markdown with what is needed to repeat a measurement, written after every row."""

import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def commit() -> str:
    """Return the commit at hand, marked when files differ from it."""
    try:
        head = _git("rev-parse", "--short=10", "HEAD")
        return head + (" with local changes" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    run = subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True)  # noqa: S603, S607
    return run.stdout.strip()


def machine() -> str:
    """Return the processor, the cores at hand, and the Python version."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        name = names[0] if names else name
    return f"{name}, {len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}"


def spread(values: Sequence[float]) -> str:
    """Return "median (least–most)", or the value where there is one."""
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{statistics.median(values):.2f} ({min(values):.2f}–{max(values):.2f})"


class Table:
    """A Markdown table that is rewritten after each row, so that a run that is cut short leaves what it measured.

    Args:
        path: File to write; None prints only.
        title: Heading.
        columns: Names of the columns.
        notes: Lines above the table: what was run on what.
        append: Leave what the file has, and write below it.
    """

    def __init__(
        self, path: Path | None, title: str, columns: Sequence[str], notes: Sequence[str], append: bool = False
    ) -> None:
        self._path = path
        self._before = f"{path.read_text('utf-8')}\n" if append and path is not None and path.is_file() else ""
        program = ["python", "-m", _program(), *sys.argv[1:]]
        facts = [
            *notes,
            f"Command: `{shlex.join(program)}`",
            f"Date: {datetime.now(UTC):%Y-%m-%d %H:%M} UTC. Machine: {machine()}. Commit: {commit()}.",
        ]
        self._lines = [f"# {title}", "", *(f"- {fact}" for fact in facts), ""]
        self._lines += ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
        print("\n".join(self._lines), flush=True)

    def add(self, *cells: object) -> None:
        """Append a row."""
        self._lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
        print(self._lines[-1], flush=True)
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text(self._before + "\n".join(self._lines) + "\n", "utf-8")


def _program() -> str:
    spec = sys.modules["__main__"].__spec__
    return spec.name.removesuffix(".__main__") if spec is not None else Path(sys.argv[0]).name
