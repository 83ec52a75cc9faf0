"""Rounding of weights that makes one weight's rounding error take back another's.

Rounded one by one, the errors of a layer's weights add up as if its inputs were independent. They are not: neighbouring
pixels are alike, and so are many channels. With Σ the covariance of the codes that the layer reads, the error of one
output is r·Σ·rᵀ for the vector r of rounding errors, and codes further than the nearest can make it much smaller. They
are found one column after the other: the error of a column moves the columns that are not rounded yet to where they
make up for it best, which the Cholesky factor of Σ⁻¹ says in closed form (Hassibi & Stork 1993; Frantar et al. 2023).
What was rounded early did not know of what came later. So then each column is looked at again, several times, and takes
the code that is best beside all others as they are, until none moves (coordinate descent on r·Σ·rᵀ). The mean of the
inputs is left out of Σ, since the bias takes back what it does.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from services.quantizer.grids import WeightGrid
from services.quantizer.learned import QuantizedConv2d, QuantizedLayer

DAMPING = 0.01  # of the covariance's mean diagonal, added to it: keeps the solution from trusting it to the last digit
LARGEST = (
    4608  # weights of an output channel, 512×3×3; the covariance of more (a classifier on a whole map) is too large
)
POSITIONS = 784  # of an image that are looked at, 28×28, evenly spread; neighbours tell the same
BLOCK = 64  # columns between two updates of all that follow
PASSES = 20  # over all columns, at most; few codes move after the first ones
CHUNK = 8  # images that are unfolded at a time
# How far from a code a weight may stay, in spacings: from nearer the edge, the first steps of training undo the choice.
INSIDE = 0.2


def covariance(layer: QuantizedLayer, codes: Tensor) -> tuple[Tensor, int]:
    """Return the covariance of what each weight of an output channel multiplies, and how many samples it is from.

    Args:
        layer: The layer.
        codes: What it reads, N×C×H×W or N×F.

    Returns:
        float64 G×K×K, for G groups of channels and K weights of an output channel; the number of samples.
    """
    groups = layer.groups if isinstance(layer, QuantizedConv2d) else 1
    width = layer.weight[0].numel()
    square = torch.zeros(groups, width, width, dtype=torch.float64, device=codes.device)
    total = square.new_zeros(groups, width)
    samples = 0
    for part in codes.split(CHUNK if codes.dim() == 4 else max(1, len(codes))):
        seen = _patches(layer, part, groups, width)
        square += (seen @ seen.transpose(1, 2)).double()
        total += seen.sum(2).double()
        samples += seen.shape[2]
    mean = total / samples
    return square / samples - mean[:, :, None] * mean[:, None, :], samples


def _patches(layer: QuantizedLayer, codes: Tensor, groups: int, width: int) -> Tensor:
    """Return what the weights multiply, G×K×samples."""
    if not isinstance(layer, QuantizedConv2d):
        return codes.t().unsqueeze(0)
    kernel: tuple[int, ...] = tuple(layer.weight.shape[2:])
    padding: tuple[int, ...] = layer.padding  # type: ignore[assignment]  # numbers: model intake makes them so
    stride: tuple[int, ...] = tuple(layer.stride)
    sizes = [
        (size + 2 * pad - dilation * (side - 1) - 1) // step + 1
        for size, pad, dilation, side, step in zip(
            codes.shape[2:], padding, layer.dilation, kernel, layer.stride, strict=True
        )
    ]
    every = max(1, round((sizes[0] * sizes[1] / POSITIONS) ** 0.5))
    stride = tuple(step * every for step in stride)
    if kernel == (1, 1) and not any(padding):
        rows = codes[:, :, :: stride[0], :: stride[1]].flatten(2)
    else:
        rows = F.unfold(codes.contiguous(), kernel, layer.dilation, padding, stride)
    return rows.reshape(len(codes), groups, width, -1).permute(1, 2, 0, 3).reshape(groups, width, -1)


def compensated_codes(weight: Tensor, covariance: Tensor, grid: WeightGrid) -> Tensor:
    """Return integer codes of ``weight`` whose errors make up for each other.

    Args:
        weight: In units of the step, float G×O×K.
        covariance: Of the inputs, float64 G×K×K, positive definite.
        grid: Codes that there are.

    Returns:
        Codes, shaped and typed as the weight.
    """
    # The columns that matter most go first, while there are many left to make up for them.
    order = covariance.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True)
    rows = order[:, :, None].expand_as(covariance)
    sorted_covariance = covariance.gather(1, rows).gather(2, rows.transpose(1, 2))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(sorted_covariance))
    factor = torch.linalg.cholesky(inverse, upper=True).to(weight.dtype)
    columns = order[:, None, :].expand_as(weight)
    rest = weight.gather(2, columns)
    codes = torch.empty_like(rest)
    width = rest.shape[2]
    for begin in range(0, width, BLOCK):
        end = min(begin + BLOCK, width)
        block, errors = rest[:, :, begin:end].clone(), torch.empty_like(rest[:, :, begin:end])
        for index in range(end - begin):
            column = begin + index
            code = grid.nearest(block[:, :, index])
            errors[:, :, index] = (block[:, :, index] - code) / factor[:, column, column, None]
            codes[:, :, column] = code
            block[:, :, index + 1 :] -= errors[:, :, index, None] * factor[:, column, None, column + 1 : end]
        rest[:, :, end:] -= errors @ factor[:, begin:end, end:]
    return torch.empty_like(codes).scatter_(2, columns, codes)


def improved_codes(weight: Tensor, codes: Tensor, covariance: Tensor, grid: WeightGrid, passes: int = PASSES) -> Tensor:
    """Return codes with no more error in the outputs; with passes enough, no single one could still be better.

    Args:
        weight: In units of the step, float G×O×K.
        codes: Of the weight, to begin with, likewise.
        covariance: Of the inputs, float64 G×K×K, positive definite.
        grid: Codes that there are.
        passes: Over all columns, at most.

    Returns:
        Codes, shaped and typed as the weight.
    """
    codes, covariance = codes.clone(), covariance.to(weight.dtype)
    slope = (weight - codes) @ covariance  # half of what the error falls by for each unit that a code rises
    width = weight.shape[2]
    for _ in range(passes):
        moved = False
        for begin in range(0, width, BLOCK):
            end = min(begin + BLOCK, width)
            block, here = covariance[:, begin:end, begin:end], slope[:, :, begin:end].clone()
            moves = torch.zeros_like(here)
            for index in range(end - begin):
                code, curvature = codes[:, :, begin + index], block[:, index, index, None]
                move = grid.nearest(code + here[:, :, index] / curvature) - code
                move = torch.where(move * (move * curvature - 2 * here[:, :, index]) < 0, move, 0)
                code += move
                moves[:, :, index] = move
                here -= move[:, :, None] * block[:, None, index]
            if moves.any():
                moved = True
                slope -= moves @ covariance[:, begin:end]
        if not moved:
            break
    return codes


@torch.no_grad()
def settle_weights(layer: QuantizedLayer, codes: Tensor, clips: Sequence[float] = (1.0,)) -> None:
    """Move a layer's weights to where they round to codes whose errors make up for each other, in place.

    Args:
        layer: Its step is set. One with more than ``LARGEST`` weights in an output channel is left as it is.
        codes: What it reads, N×C×H×W or N×F.
        clips: Shares of the step that are tried. An output channel's step becomes the one whose errors, clipped weights
            included, then add least to its output, before codes are looked at again.
    """
    if layer.weight[0].numel() > LARGEST:
        return
    seen, samples = covariance(layer, codes)
    groups, width, _ = seen.shape
    level = seen.diagonal(dim1=1, dim2=2).mean(1)
    # Few samples leave directions unseen, in which errors would look free: the fewer, the less the covariance counts.
    level = level * (DAMPING + width / samples)
    level = torch.where(level > 0, level, 1.0)
    seen += torch.diag_embed(level[:, None].expand(groups, width))
    weight = layer.folded_weight().detach().flatten(1)
    steps = layer.log_step.detach().exp()[:, None] * weight.new_tensor(clips)
    flat = (weight[:, None] / steps[:, :, None]).view(groups, -1, width)
    wanted = compensated_codes(flat, seen, layer.grid)
    errors = (flat - wanted).double()
    noise = (errors @ seen * errors).sum(2).view_as(steps) * steps.square()
    rows, best = torch.arange(len(weight), device=weight.device), noise.argmin(1)
    flat, wanted = (values.view(len(weight), -1, width)[rows, best] for values in (flat, wanted))
    step = steps[rows, best]
    by_group = (groups, -1, width)
    wanted = improved_codes(flat.view(by_group), wanted.view(by_group), seen, layer.grid).view_as(flat)
    near = INSIDE * layer.grid.spacing
    settled = torch.minimum(torch.maximum(flat, wanted - near), wanted + near) * step[:, None]
    layer.log_step.data.copy_(step.log())
    layer.weight.data.copy_(settled.view_as(layer.weight) / layer.input_scale())
