"""Rules of architecture that imports and sizes show. Who may import whom stands in pyproject.toml (import-linter)."""

import ast
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAY_IMPORT_GRPC = (
    "granq/*",
    "services/*/servicer.py",
    "services/*/server.py",
    "services/*/__main__.py",
    "services/*/*_client.py",  # the mirror of a servicer: turns calls to another service into functions
    "services/common/rpc/*.py",
)
NO_TORCH = ("services/coordinator/*", "services/evaluator/*", "services/common/*", "granq/*")
TORCH_ALLOWED = ("services/common/models/*", "services/common/kernels/*")
MAX_LINES, MAX_SERVICER_LINES = 300, 150
SOURCES = sorted(
    path for folder in ("granq", "services") for path in (ROOT / folder).rglob("*.py") if "v1" not in path.parts
)


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def matches(path: Path, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name_of(path), pattern) for pattern in patterns)


def imported(path: Path) -> set[str]:
    """Return the dotted names that a file imports when it runs, at whatever place in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def uses_grpc(path: Path) -> bool:
    return any(
        name.split(".")[0] in ("grpc", "grpc_health", "grpc_reflection", "grpc_status") or name.endswith("_pb2_grpc")
        for name in imported(path)
    )


def uses_torch(path: Path) -> bool:
    return any(name.split(".")[0] in ("torch", "torchvision") for name in imported(path))


def test_there_is_something_to_check() -> None:
    assert len(SOURCES) > 20


@pytest.mark.parametrize("path", [p for p in SOURCES if not matches(p, MAY_IMPORT_GRPC)], ids=name_of)
def test_domain_code_knows_no_grpc(path: Path) -> None:
    assert not uses_grpc(path), "only servicers, servers, clients and services/common/rpc import grpc"


@pytest.mark.parametrize(
    "path", [p for p in SOURCES if matches(p, NO_TORCH) and not matches(p, TORCH_ALLOWED)], ids=name_of
)
def test_small_services_know_no_torch(path: Path) -> None:
    assert not uses_torch(path)


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_files_stay_readable(path: Path) -> None:
    limit = MAX_SERVICER_LINES if path.name == "servicer.py" else MAX_LINES
    lines = len(path.read_text("utf-8").splitlines())
    assert lines <= limit, f"{lines} lines: split it by responsibility"
