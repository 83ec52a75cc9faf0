"""What this machine tells of itself when it registers as a device."""

from importlib.metadata import version

from granq.engines.machine import find_gpu, memory_bytes
from granq.v1 import devices_pb2
from services.evaluator import runtimes
from services.evaluator.settings import EvaluatorSettings


def device_info(settings: EvaluatorSettings, address: str) -> devices_pb2.DeviceInfo:
    """Return what this machine is and can do.

    Args:
        settings: Name, targets and labels.
        address: host:port to dial; empty for none.
    """
    found, gpu = runtimes.capabilities(), find_gpu()
    return devices_pb2.DeviceInfo(
        device_id=settings.device_id,
        address=address,
        runtimes=found.runtimes,
        platform=found.platform,
        cpu=found.cpu,
        gpu=found.gpu,
        compute_capability=found.compute_capability,
        driver_version=found.driver_version,
        memory_bytes=memory_bytes(),
        gpu_memory_bytes=gpu.memory_bytes if gpu is not None else 0,
        targets=settings.device_targets,
        labels=settings.device_labels,
        version=version("granq-pipeline"),
    )
