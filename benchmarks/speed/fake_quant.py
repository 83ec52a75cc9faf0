"""Fake quantization forward and backward: the published chain, the loop over channels, and ours by granularity."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.speed.published import fake_quantize_chain, fake_quantize_loop
from benchmarks.speed.timing import Clock, copy_seconds, in_turn
from services.quantizer import kernels
from services.quantizer.config import ActivationGranularity
from services.quantizer.fake_quant import activation_dims, fake_quantize
from services.quantizer.kernels import eager

BITS = 4
SHAPES = [(16, 16, 32, 32), (16, 64, 8, 8), (16, 64, 56, 56), (64, 64, 56, 56), (64, 256, 56, 56)]
LOOP_VALUES = 2**22  # more would keep the loop over channels busy for minutes
COLUMNS = (
    "N×C×H×W",
    "type, format",
    "copy ms (floor)",
    "loop over channels ms",
    "chain ms (baseline)",
    "plain PyTorch ms",
    "fused ms",
    "baseline / fused",
    "fused / floor",
    "per sample and channel / per tensor",
    "equal",
)
NOTES = (
    f"{BITS} bits, one range per sample and channel. Loop and chain as published, eager; fused: services/quantizer/"
    "kernels; plain PyTorch: what an installation without a C++ compiler runs. Backward is the identity in all.",
    "Floor: one read and one write of the tensor into memory that is there already.",
    "Equal: fused and plain PyTorch agree bit for bit.",
)


def _through(quantize: Callable[[Tensor], Tensor], x: Tensor, gradient: Tensor) -> Callable[[], object]:
    leaf = x.clone().requires_grad_()

    def call() -> object:
        return torch.autograd.grad(quantize(leaf), leaf, gradient)

    return call


def rows(runs: int, clock: Clock, device: torch.device) -> Iterator[tuple[object, ...]]:
    """Yield a row for each shape, number type and memory format."""
    fine = activation_dims(4, ActivationGranularity.PER_SAMPLE_CHANNEL)
    coarse = activation_dims(4, ActivationGranularity.PER_TENSOR)
    for shape in SHAPES:
        for dtype, form in (
            (torch.float32, torch.contiguous_format),
            (torch.float32, torch.channels_last),
            (torch.bfloat16, torch.channels_last),
        ):
            x = torch.randn(shape, device=device).to(dtype).contiguous(memory_format=form)
            gradient = torch.randn_like(x)
            variants = {
                "copy": copy_seconds(x),
                "chain": _through(lambda v: fake_quantize_chain(v, fine, BITS), x, gradient),
                "plain": _through(_Plain.apply, x, gradient),
                "fused": _through(lambda v: fake_quantize(v, fine, BITS), x, gradient),
                "tensor": _through(lambda v: fake_quantize(v, coarse, BITS), x, gradient),
            }
            if x.numel() <= LOOP_VALUES and form is torch.contiguous_format:
                variants["loop"] = _through(lambda v: fake_quantize_loop(v, BITS), x, gradient)
            taken = {name: 1e3 * seconds for name, seconds in in_turn(variants, runs, clock, device).items()}
            equal = torch.equal(kernels.fake_quantize(x, fine, BITS), eager.fake_quantize(x, fine, BITS)[0])
            yield (
                "×".join(map(str, shape)),
                f"{str(dtype).removeprefix('torch.')}, {'NCHW' if form is torch.contiguous_format else 'NHWC'}",
                f"{taken['copy']:.3f}",
                f"{taken['loop']:.1f}" if "loop" in taken else "–",
                *(f"{taken[name]:.3f}" for name in ("chain", "plain", "fused")),
                f"{taken['chain'] / taken['fused']:.1f}",
                f"{taken['fused'] / taken['copy']:.1f}",
                f"{taken['fused'] / taken['tensor']:.2f}",
                "yes" if equal else "NO",
            )


class _Plain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return eager.fake_quantize(x, activation_dims(4, ActivationGranularity.PER_SAMPLE_CHANNEL), BITS)[0]

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> Tensor:
        return grads[0]
