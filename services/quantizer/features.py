"""Feature distillation: the student's BatchNorm outputs, or what they were folded into, follow the teacher's.

The logits of a batch say little about hundreds of channels, so training from them alone is slow and fits the synthetic
images. Every BatchNorm of the teacher gives a target for each of its channels, in units that its own γ defines: its
output is γ·x̂ + β with x̂ of unit variance over the training data. So the error of all layers is comparable as

    L_F = mean over BatchNorm layers of mean((f_S − f_T)² / γ²)

which is the inverse of the layer's signal-to-noise ratio. Matching intermediate features is the idea of FitNets (Romero
et al. 2015); reconstruction of layers makes post-training quantization work with little data (BRECQ, Li et al. 2021).
"""

from collections.abc import Callable

from torch import Tensor, fx, nn

from services.quantizer.graph import BATCH_NORM_TYPES, input_of, module_of

# A channel that the teacher all but switched off (γ near 0) must not rule the loss; relative to the layer's mean |γ|.
LEAST_GAMMA = 0.1


class FeatureLoss:
    """L_F between a teacher and a student; call it right after both ran on the same images.

    Args:
        teacher: Frozen float graph with its BatchNorm layers, in evaluation mode; it gets forward hooks.
        student: Made of the same graph, with its BatchNorm layers kept or folded; it gets forward hooks.
    """

    def __init__(self, teacher: fx.GraphModule, student: fx.GraphModule) -> None:
        self._taught: dict[str, Tensor] = {}
        self._learned: dict[str, Tensor] = {}
        self._deviations: dict[str, Tensor] = {}
        kept = dict(student.named_modules())
        for node in teacher.graph.nodes:
            norm = module_of(teacher, node)
            if not isinstance(norm, BATCH_NORM_TYPES):
                continue
            name = str(node.target)
            # A folded BatchNorm's output is that of the layer before it.
            counterpart = kept[name if name in kept else str(input_of(node).target)]
            gamma = norm.weight.detach().abs() if norm.weight is not None else norm.running_mean.new_ones(())
            self._deviations[name] = gamma.clamp_min(LEAST_GAMMA * float(gamma.mean()))
            norm.register_forward_hook(keep_output(self._taught, name))
            counterpart.register_forward_hook(keep_output(self._learned, name))

    def __call__(self) -> Tensor:
        """Return L_F of the last run of both, a scalar, differentiable in the student's parameters."""
        terms = []
        for name, deviation in self._deviations.items():
            taught, learned = self._taught.pop(name), self._learned.pop(name)
            scale = deviation.view(1, -1, *[1] * (taught.dim() - 2)) if deviation.dim() else deviation
            terms.append(((learned - taught) / scale).square().mean())
        total: Tensor = sum(terms[1:], terms[0])
        return total / len(terms)


def keep_output(where: dict[str, Tensor], name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    """Return a forward hook that keeps a module's last output under ``name``."""

    def hook(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        where[name] = output

    return hook
