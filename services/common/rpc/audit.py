"""The audit log: one line for each call that changes something, whether it was let in or not."""

import grpc

from services.common.logs import AUDIT_LOGGER, get_logger

_log = get_logger(AUDIT_LOGGER)
# Where the contract names what a message is about, in the order of preference.
_HOLDERS = ("", "key", "open.key", "pipeline", "job", "artifact")
_NAMES = ("pipeline_id", "job_id", "digest")


def target_of(message: object) -> str:
    """Return what a request or an answer is about: an id, a digest, or "" where it names nothing."""
    for path in _HOLDERS:
        holder: object | None = message
        for step in path.split(".") if path else ():
            holder = getattr(holder, step, None)
        for name in _NAMES:
            value = getattr(holder, name, "")
            if isinstance(value, str) and value:
                return value
    return ""


def record(principal: str, method: str, target: str, code: grpc.StatusCode, peer: str) -> None:
    """Write who did what to which, and how it ended. Never what was sent along: it may hold secrets."""
    _log.info("audit", principal=principal, method=method, target=target, outcome=code.name, peer=peer)
