"""Paths named by a request, kept inside a configured folder."""

from pathlib import Path

from services.common.errors import FailedPreconditionError, InvalidArgumentError


def resolve_under(root: Path, path: str, field: str) -> Path:
    """Return the real path of ``path`` below ``root``.

    Symbolic links are followed first and judged by where they lead, so neither ".." nor a link leaves the root.

    Args:
        root: Folder that the operator configured.
        path: Relative path from the request.
        field: Name of the request's field, for the error.

    Raises:
        FailedPreconditionError: The root itself is not a folder.
        InvalidArgumentError: The path is absolute, leads outside the root, or does not exist.
    """
    try:
        base = root.resolve(strict=True)
    except (OSError, RuntimeError):
        base = None
    if base is None or not base.is_dir():
        raise FailedPreconditionError(
            "the dataset root is not a folder on this server; its operator must set GRANQ_DATASET_ROOT to one",
            reason="DATASET_ROOT_MISSING",
        )
    if "\0" in path or Path(path).is_absolute():
        raise InvalidArgumentError(f"{path!r} must be a path relative to the dataset root", field=field)
    try:
        target = (base / path).resolve(strict=True)
    except (OSError, RuntimeError):
        # An outside path is refused in the same words whether or not it exists, so a request cannot probe the disk.
        target = None
    if target is None or not target.is_relative_to(base):
        raise InvalidArgumentError(f"{path!r} does not exist under the dataset root", field=field)
    return target
