"""Builds named architectures with a user's weights: torchvision's classification models and the CIFAR ResNets."""

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from services.common.models import cifar_resnet
from services.common.models.archive import refuse

FIELD: Final = "model.architecture"
_CIFAR: Final[dict[str, Callable[..., nn.Module]]] = {
    "resnet20": cifar_resnet.resnet20,
    "resnet56": cifar_resnet.resnet56,
}
# Their published weights go with transform_input=True, which no state dict says; a wrong guess costs accuracy unseen.
_AMBIGUOUS: Final = ("googlenet", "inception_v3")
_SHOWN: Final = 3


def check_name(name: str) -> None:
    """Check that an architecture exists, before weights are read.

    Raises:
        InvalidArgumentError: ARCHITECTURE_UNKNOWN or ARCHITECTURE_AMBIGUOUS.
    """
    if name in _AMBIGUOUS:
        raise refuse(
            "ARCHITECTURE_AMBIGUOUS",
            f"weights alone do not say how {name} normalizes its input (transform_input); send it as .pt2 "
            "(torch.export.export and torch.export.save)",
            FIELD,
        )
    if name in _CIFAR:
        return
    import torchvision

    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise refuse(
            "ARCHITECTURE_UNKNOWN",
            f"{name!r} is neither a torchvision classification model (such as resnet18, mobilenet_v2) nor resnet20 or "
            "resnet56; send other networks as .pt2",
            FIELD,
        )


def build(name: str, state: dict[str, torch.Tensor], in_channels: int, num_classes: int | None) -> nn.Module:
    """Return the architecture with the given weights, float32, in eval mode. Nothing is downloaded.

    Args:
        name: Checked by :func:`check_name`.
        state: Weights by name.
        in_channels: Channels of the image.
        num_classes: Number of classes, or None to take it from the classifier's weights.

    Raises:
        InvalidArgumentError: WEIGHTS_MISMATCH, BATCH_NORM_FOLDED, BATCH_NORM_MISSING or INPUT_SHAPE_MISMATCH.
    """
    with _NoWeights():
        model = _create(name, num_classes or 1000, in_channels)
        _check_batch_norm(name, model)
        classifier = _classifier(model)
        if num_classes is None and f"{classifier}.weight" in state:
            model = _create(name, int(state[f"{classifier}.weight"].shape[0]), in_channels)
    if name not in _CIFAR and in_channels != 3:
        raise refuse(
            "INPUT_SHAPE_MISMATCH",
            f"{name} takes 3 channels, not {in_channels}; repeat a grey image",
            "model.input_shape",
        )
    _check_names(name, model.state_dict(), state)
    counters = {
        key: torch.zeros((), dtype=torch.int64) for key in model.state_dict() if key.endswith("num_batches_tracked")
    }
    model.load_state_dict(
        counters | {key: value.float() if value.is_floating_point() else value for key, value in state.items()},
        assign=True,
    )
    return model.eval()


class _NoWeights(TorchFunctionMode):
    """Gives new parameters, which torch.empty makes, no memory.

    Everything else stays on the CPU: some architectures (RegNet) compute their sizes with tensors, which would have no
    values with the meta device as the default.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Make empty tensors on the meta device."""
        kwargs = kwargs or {}
        return func(*args, **(kwargs | {"device": "meta"} if func is torch.empty else kwargs))


def _create(name: str, num_classes: int, in_channels: int) -> nn.Module:
    if name in _CIFAR:
        return _CIFAR[name](num_classes=num_classes, in_channels=in_channels)
    import torchvision

    model: nn.Module = torchvision.models.get_model(name, weights=None, num_classes=num_classes)
    return model


def _check_batch_norm(name: str, model: nn.Module) -> None:
    """Refuse an architecture that never had BatchNorm layers, whatever its weights."""
    if any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        return
    raise refuse("BATCH_NORM_MISSING", f"{name} {no_batch_norm(model)}", FIELD)


def no_batch_norm(model: nn.Module) -> str:
    """Return what there is to say about a model without BatchNorm layers, to follow its name."""
    others = sorted({type(m).__name__ for m in model.modules() if isinstance(m, (nn.LayerNorm, nn.GroupNorm))})
    instead = f": it normalizes with {' and '.join(others)}, which keeps none" if others else ""
    return f"has no BatchNorm layers, whose statistics stand in for training data{instead}"


def _classifier(model: nn.Module) -> str:
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return names[-1] if names else ""


def _check_names(name: str, expected: dict[str, Any], state: dict[str, torch.Tensor]) -> None:
    missing = [key for key in expected if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in expected]
    for key, value in expected.items():
        if key in state and value.is_floating_point() and not state[key].is_floating_point():
            raise refuse(
                "WEIGHTS_INVALID",
                f"tensor {key!r} has elements of type {state[key].dtype}; save the weights as float32",
            )
    wrong = [
        f"{key} (is {tuple(state[key].shape)}, must be {tuple(value.shape)})"
        for key, value in expected.items()
        if key in state and state[key].shape != value.shape
    ]
    if any(key.endswith("running_mean") for key in missing) and not any(key.endswith("running_mean") for key in state):
        raise refuse(
            "BATCH_NORM_FOLDED",
            f"the weights hold no BatchNorm statistics, which {name} has: BatchNorm seems to be folded into the "
            "convolutions. The statistics stand in for training data, so send the weights from before folding (fusing)",
        )
    parts = [
        f"{title}: {', '.join(keys[:_SHOWN])}{f' and {len(keys) - _SHOWN} more' if len(keys) > _SHOWN else ''}"
        for title, keys in (("missing", missing), ("unexpected", unexpected), ("wrong shape", wrong))
        if keys
    ]
    if parts:
        raise refuse("WEIGHTS_MISMATCH", f"the weights do not fit {name}: {'; '.join(parts)}")
