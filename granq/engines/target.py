"""What an engine target may say. The contract's own rules, for places without its validator, such as a device."""

import re

from granq.v1 import common_pb2

_LARGEST_BATCH = 4096
_LEAST_WORKSPACE = 1 << 20
_MOST_CAPABILITIES = 8
_HIGHEST_LEVEL = 5
_CAPABILITY = re.compile(r"[0-9]{1,2}\.[0-9]")
_TEXTS = {
    "name": (re.compile(r"([a-z0-9][a-z0-9._-]{0,63})?"), "must be of a-z, 0-9, '.', '_' and '-', at most 64"),
    "platform": (re.compile(r"([a-z0-9]+-[a-z0-9_]+)?"), 'must be such as "linux-aarch64"'),
    "runtime_version": (re.compile(r"([0-9]+(\.[0-9]+)*)?"), 'must be such as "10" or "10.3"'),
}


def fault_of(target: common_pb2.EngineTarget) -> tuple[str, str] | None:
    """Return the field of a target that cannot be, and what it must be; None where all is well."""
    if target.runtime not in common_pb2.Runtime.values():
        return "runtime", "is none that this version knows"
    for name in ("min", "opt", "max") if target.HasField("batch") else ():
        if not 1 <= getattr(target.batch, name) <= _LARGEST_BATCH:
            return f"batch.{name}", f"must be 1 to {_LARGEST_BATCH}"
    if not target.batch.min <= target.batch.opt <= target.batch.max:
        return "batch", "min, opt and max must ascend"
    if target.HasField("workspace_bytes") and target.workspace_bytes < _LEAST_WORKSPACE:
        return "workspace_bytes", f"must be {_LEAST_WORKSPACE} (1 MiB) or more"
    if target.HasField("optimization_level") and not 0 <= target.optimization_level <= _HIGHEST_LEVEL:
        return "optimization_level", f"must be 0 to {_HIGHEST_LEVEL}"
    wanted = list(target.compute_capabilities)
    if (
        len(set(wanted)) < len(wanted)
        or len(wanted) > _MOST_CAPABILITIES
        or not all(map(_CAPABILITY.fullmatch, wanted))
    ):
        return "compute_capabilities", f'must be different ones such as "8.6", at most {_MOST_CAPABILITIES}'
    for name, (pattern, rule) in _TEXTS.items():
        if not pattern.fullmatch(getattr(target, name)):
            return name, rule
    return None
