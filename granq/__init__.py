"""GranQ Pipeline: zero-shot quantization of CNNs as a service. This package is the client.

It needs grpcio and protobuf, nothing else. Names are loaded when they are first used, so that ``import granq`` costs
next to nothing::

    import granq

    with granq.Client("127.0.0.1:50050") as client:
        model = client.upload("resnet20.pt2")
        spec = granq.pipeline_spec(granq.model_source(model), weight_bits=4, activation_bits=4)
        pipeline = client.submit(spec)
        for event in client.watch(pipeline.pipeline_id):
            print(event.sequence, event.progress.phase)
        client.download(client.get(pipeline.pipeline_id).results.bundle, "bundle.zip")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from granq.client import DEFAULT_ADDRESS, Client
    from granq.errors import GranqClientError
    from granq.specs import (
        batch_profile,
        dataset,
        engine_target,
        model_source,
        pipeline_spec,
        quantization_config,
        synthesis_config,
        training_config,
    )

__all__ = [
    "DEFAULT_ADDRESS",
    "Client",
    "GranqClientError",
    "batch_profile",
    "dataset",
    "engine_target",
    "model_source",
    "pipeline_spec",
    "quantization_config",
    "synthesis_config",
    "training_config",
]

_HOMES = {"DEFAULT_ADDRESS": "granq.client", "Client": "granq.client", "GranqClientError": "granq.errors"}


def __getattr__(name: str) -> Any:
    """Load a public name on first use (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module 'granq' has no attribute {name!r}")
    value = getattr(import_module(_HOMES.get(name, "granq.specs")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, loaded or not."""
    return sorted(__all__)
