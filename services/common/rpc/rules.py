"""Which scope each RPC needs, and which ones change something: one table for all services.

A test compares it with the contract; an RPC that is missing here needs ADMIN, so that a forgotten line opens nothing.
"""

from dataclasses import dataclass

from services.common.principal import Scope


@dataclass(frozen=True)
class Rule:
    """What holds for one RPC.

    Attributes:
        scope: What the caller needs; None for everybody, without credentials.
        mutates: Whether the call changes something, and is written to the audit log.
    """

    scope: Scope | None
    mutates: bool = False


_SEE = Rule(Scope.READ)
_CHANGE = Rule(Scope.SUBMIT, mutates=True)
_WORKER_SEE = Rule(Scope.SERVICE)
_WORKER_CHANGE = Rule(Scope.SERVICE, mutates=True)
_EVERYBODY = Rule(None)
UNLISTED = Rule(Scope.ADMIN, mutates=True)

_SERVICES: dict[str, dict[str, Rule]] = {
    "granq.v1.PipelineService": {
        "SubmitPipeline": _CHANGE,
        "GetPipeline": _SEE,
        "ListPipelines": _SEE,
        "WatchPipeline": _SEE,
        "CancelPipeline": _CHANGE,
        "RetryPipeline": _CHANGE,
        "DeletePipeline": _CHANGE,
    },
    "granq.v1.ArtifactService": {
        "UploadArtifact": _CHANGE,
        "DownloadArtifact": _SEE,
        "GetArtifact": _SEE,
    },
    # Whoever may call a worker gets around the ownership of pipelines, so users may not.
    "granq.v1.JobService": {
        "GetJob": _WORKER_SEE,
        "ListJobs": _WORKER_SEE,
        "WatchJob": _WORKER_SEE,
        "CancelJob": _WORKER_CHANGE,
    },
    "granq.v1.GeneratorService": {"StartSynthesize": _WORKER_CHANGE, "CoTrain": _WORKER_CHANGE},
    "granq.v1.QuantizerService": {
        "StartInspect": _WORKER_CHANGE,
        "StartQuantize": _WORKER_CHANGE,
        "StartSimulate": _WORKER_CHANGE,
        "StartExport": _WORKER_CHANGE,
    },
    "granq.v1.EvaluatorService": {
        "GetCapabilities": _WORKER_SEE,
        "StartEvaluate": _WORKER_CHANGE,
        "StartBuildEngine": _WORKER_CHANGE,
    },
    # Devices enter the pool as services; a heartbeat is no event worth an audit line.
    "granq.v1.DeviceService": {
        "RegisterDevice": _WORKER_CHANGE,
        "SendHeartbeat": _WORKER_SEE,
        "DeregisterDevice": _WORKER_CHANGE,
        "ServeJobs": _WORKER_CHANGE,
        "ListDevices": _SEE,
        "RemoveDevice": Rule(Scope.ADMIN, mutates=True),
    },
    # Probes have no credentials; what they learn is that the server serves. A watch would hold a place for ever.
    "grpc.health.v1.Health": {"Check": _EVERYBODY, "List": _EVERYBODY, "Watch": _SEE},
    # The contract is public, but which services run where is not everybody's business.
    "grpc.reflection.v1alpha.ServerReflection": {"ServerReflectionInfo": _SEE},
}

RULES: dict[str, Rule] = {
    f"/{service}/{method}": rule for service, methods in _SERVICES.items() for method, rule in methods.items()
}
"""Rule of each RPC by its full name, such as "/granq.v1.JobService/GetJob"."""


def rule_of(method: str) -> Rule:
    """Return what holds for an RPC, by its full name."""
    return RULES.get(method, UNLISTED)
