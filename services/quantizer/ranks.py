"""Ranks: processes that train one student together, each on its part of every batch.

Gradients are added up by hand instead of by DistributedDataParallel: an iteration goes backward twice through one
forward pass, to the images for the generator and to the parameters for the student, which its reducer cannot follow.
Adding the parts' gradients, weighted by their share of the batch, gives the gradient of the whole batch in another
order of summation. Every rank then takes the same step of the optimizer, so the students stay equal.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from services.quantizer.batches import Batch


class Ranks:
    """The one process of a training that has no others."""

    rank = 0
    size = 1

    def share(self, draw: Callable[[], Batch]) -> Batch:
        """Return the batch that rank 0 draws."""
        return draw()

    def part(self, count: int) -> slice:
        """Return which of ``count`` samples are this rank's; parts differ by one sample at most."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def gather(self, part: Tensor, count: int) -> Tensor:
        """Return all ranks' parts of a tensor of ``count`` samples."""
        return part

    def add_up(self, tensors: list[Tensor]) -> None:
        """Replace float tensors, in place, by their sums over the ranks."""

    def extremes(self, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        """Return the least ``lo`` and the largest ``hi`` of all ranks."""
        return lo, hi


class ProcessGroup(Ranks):
    """The ranks of the default process group of torch.distributed.

    Args:
        device: Where this rank computes.
    """

    def __init__(self, device: torch.device) -> None:
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        self._device = device

    def share(self, draw: Callable[[], Batch]) -> Batch:
        """Return the batch that rank 0 draws; the others only receive."""
        if self.rank == 0:
            batch = draw()
            tensors = [batch.images.contiguous(), batch.labels, batch.logits]
            sizes = torch.tensor([*batch.images.shape, batch.logits.shape[1]], device=self._device)
        else:
            sizes = torch.empty(5, dtype=torch.int64, device=self._device)
        dist.broadcast(sizes, 0)
        if self.rank > 0:
            count, *shape, classes = sizes.tolist()
            tensors = [torch.empty(count, *shape, device=self._device)]
            tensors += [torch.empty(count, dtype=torch.int64, device=self._device)]
            tensors += [torch.empty(count, classes, device=self._device)]
        for tensor in tensors:
            dist.broadcast(tensor, 0)
        return Batch(*tensors)

    def gather(self, part: Tensor, count: int) -> Tensor:
        """Return all ranks' parts of a tensor of ``count`` samples."""
        whole = part.new_zeros(count, *part.shape[1:])
        whole[self.part(count)] = part
        dist.all_reduce(whole)  # parts may differ in size, and adding zeros changes nothing
        return whole

    def add_up(self, tensors: list[Tensor]) -> None:
        """Replace float tensors, in place, by their sums over the ranks, all in one message."""
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(total.view(tensor.shape))

    def extremes(self, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        """Return the least ``lo`` and the largest ``hi`` of all ranks."""
        both = torch.stack([-lo, hi])
        dist.all_reduce(both, dist.ReduceOp.MAX)
        return -both[0], both[1]
