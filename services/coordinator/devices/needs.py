"""Which devices a job may have."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from granq.engines.fit import NAMES, build_misfits, misfits
from granq.engines.machine import Machine
from granq.v1 import common_pb2, devices_pb2, evaluator_pb2, reports_pb2
from services.coordinator.devices.table import machine_of
from services.coordinator.requests import JobCall


@dataclass(frozen=True)
class Need:
    """What a job needs of a device.

    Attributes:
        what: It, for people.
        target: Name of its engine target; empty where that has none.
        by_name: Whether only a device that lists the target's name will do.
        lacks: Returns why a machine will not do; nothing where it does.
    """

    what: str
    target: str
    by_name: bool
    lacks: Callable[[Machine], list[str]]

    def unmet(self, info: devices_pb2.DeviceInfo) -> list[str]:
        """Return why a device will not do, one sentence for each reason; nothing where it does."""
        if self.target not in info.targets and (info.targets or self.by_name):
            return [f"it is meant for {', '.join(info.targets)}" if info.targets else "it lists no such target"]
        return self.lacks(machine_of(info))


def need_of(call: JobCall) -> Need | None:
    """Return what a job needs; None where it is not for the pool, but for the evaluator that is configured."""
    request = call.request
    if isinstance(request, evaluator_pb2.StartBuildEngineRequest):
        target = request.target
        # A target that says nothing of a device means the configured evaluator, as ever.
        by_name = target.runtime == common_pb2.RUNTIME_UNSPECIFIED and not target.platform
        return Need(f"an engine for {_describe(target)}", target.name, by_name, partial(build_misfits, target))
    if isinstance(request, evaluator_pb2.StartEvaluateRequest) and request.HasField("engine"):
        manifest = request.engine
        what = f"a measurement of engine {call.engine} ({_describe_engine(manifest)})"
        return Need(what, call.engine, False, partial(misfits, manifest))
    return None


def _describe(target: common_pb2.EngineTarget) -> str:
    runtime = f"{NAMES.get(target.runtime, 'any runtime')} {target.runtime_version}".strip()
    capabilities = f"compute capability {', '.join(target.compute_capabilities)}" if target.compute_capabilities else ""
    return f"{target.name or 'a target'} ({', '.join(filter(None, (runtime, target.platform, capabilities)))})"


def _describe_engine(manifest: reports_pb2.EngineManifest) -> str:
    runtime = f"{NAMES.get(manifest.runtime, 'an unknown runtime')} {manifest.runtime_version}".strip()
    capabilities = f"compute capability {' or '.join(manifest.compute_capabilities)}"
    return ", ".join(filter(None, (runtime, manifest.platform, capabilities if manifest.compute_capabilities else "")))
