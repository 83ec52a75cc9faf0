"""Stored states of a training: safetensors, which hold numbers only, with what they belong to as metadata."""

import json
from dataclasses import asdict, dataclass
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from granq.v1 import artifacts_pb2
from services.common.artifacts import ArtifactStore
from services.common.errors import InvalidArgumentError
from services.generator.synthesis import Synthesizer

_KEY = "granq"
FORM = "generator/1"
"""Names what a state holds. Change it with that: a state of another form is refused, or the work begins anew."""


@dataclass(frozen=True)
class Effort:
    """How far a training has come, beside the state itself.

    Attributes:
        seconds: Wall time spent, in all runs.
        bn_loss: L_BNS at the last step.
    """

    seconds: float = 0.0
    bn_loss: float = 0.0


def save_state(
    store: ArtifactStore, synthesizer: Synthesizer, belongs_to: dict[str, Any], effort: Effort
) -> artifacts_pb2.Artifact:
    """Write a training's state.

    Args:
        store: Where to.
        synthesizer: The training.
        belongs_to: What it depends on, as JSON values; :func:`load_state` demands the same.
        effort: Time spent and loss so far.
    """
    metadata = {_KEY: json.dumps({"form": FORM, "belongs_to": belongs_to, "effort": asdict(effort)}, sort_keys=True)}
    return store.put_bytes(save(synthesizer.state(), metadata), "generator-state.safetensors")


def load_state(
    store: ArtifactStore, artifact: artifacts_pb2.Artifact, synthesizer: Synthesizer, belongs_to: dict[str, Any]
) -> Effort:
    """Go on from a stored state, and return the effort that was stored with it.

    Raises:
        NotFoundError: The store does not hold it.
        InvalidArgumentError: STATE_INVALID when it is no such state, STATE_MISMATCH when it belongs to another model,
            seed or configuration.
    """
    path = store.local_path(artifact.digest)
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(_KEY, "null"))
            state: dict[str, torch.Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError, OSError) as error:
        raise _invalid() from error
    if not isinstance(header, dict):
        raise _invalid()
    if header.get("form") != FORM:
        raise InvalidArgumentError(
            f"the state has the form {header.get('form')!r}, this generator reads {FORM!r}; begin anew",
            reason="STATE_MISMATCH",
            field="resume_from",
        )
    # Through JSON, so that tuples compare as the lists that they were stored as.
    expected = json.loads(json.dumps(belongs_to))
    stored = header.get("belongs_to")
    if stored != expected:
        differing = [k for k in expected if not isinstance(stored, dict) or stored.get(k) != expected[k]]
        raise InvalidArgumentError(
            f"the state belongs to another training; these differ: {', '.join(differing) or 'its form'}",
            reason="STATE_MISMATCH",
            field="resume_from",
        )
    try:
        synthesizer.restore(state)
        return Effort(**header["effort"])
    except (ValueError, KeyError, TypeError) as error:
        raise _invalid() from error


def _invalid() -> InvalidArgumentError:
    return InvalidArgumentError(
        "the artifact is not a state of the generator's training", reason="STATE_INVALID", field="resume_from"
    )
