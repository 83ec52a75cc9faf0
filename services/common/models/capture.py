"""Captures an nn.Module as a canonical torch.fx graph."""

import torch
from torch import fx, nn

from services.common.models.archive import refuse
from services.common.models.canonical import canonicalize


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Keep torch's own layers whole, and torchvision's StochasticDepth, which does nothing in inference."""
        return type(m).__name__ == "StochasticDepth" or super().is_leaf_module(m, module_qualified_name)


def capture(model: nn.Module, input_shape: tuple[int, ...]) -> fx.GraphModule:
    """Return the canonical graph of a model in eval mode.

    Args:
        model: Takes one batch N×C×H×W and returns logits N×K. Put into eval mode; its parameters are copied or shared.
        input_shape: C×H×W of one image.

    Raises:
        InvalidArgumentError: MODEL_NOT_TRACEABLE when its Python depends on data or cannot be followed;
            INPUT_SHAPE_MISMATCH when images of that shape do not pass.
    """
    model.eval()
    try:
        graph = _Tracer().trace(model)
    except Exception as error:
        detail = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
        raise refuse("MODEL_NOT_TRACEABLE", f"the model cannot be traced: {detail}", "model.architecture") from error
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    if len(placeholders) != 1:
        raise refuse(
            "MODEL_NOT_TRACEABLE", f"the model must take one batch of images; it takes {len(placeholders)} inputs"
        )
    with torch.no_grad():
        return canonicalize(fx.GraphModule(model, graph), input_shape)
