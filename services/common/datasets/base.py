"""What every labelled set offers."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from services.common.errors import InvalidArgumentError

Images = NDArray[np.float32]
Labels = NDArray[np.int64]


class LabelledSet(ABC):
    """Images with their classes, read batch by batch so that memory does not grow with the set.

    Attributes:
        description: What was opened, for reports: the path under the dataset root or the artifact's digest.
        labels: int64 N, the class of each image that is used.
    """

    def __init__(self, description: str, labels: Labels) -> None:
        if labels.size == 0:
            raise InvalidArgumentError(f"{description} holds no images", field="dataset")
        if int(labels.min()) < 0:
            raise InvalidArgumentError(f"{description} has a negative label, {int(labels.min())}", field="dataset")
        self.description = description
        self.labels = labels

    def __len__(self) -> int:
        return int(self.labels.size)

    @abstractmethod
    def _read(self, batch: int) -> Iterator[Images]:
        """Yield preprocessed images, float32 N×C×H×W, ``batch`` at a time; the caller cuts what lies beyond the end."""

    def images(self, batch: int) -> Iterator[tuple[Images, Labels]]:
        """Yield (float32 N×C×H×W, int64 N) in stored order; every batch but the last holds ``batch`` images.

        Raises:
            InvalidArgumentError: A stored image is damaged, missing, or differs in size from the ones before it.
        """
        if batch < 1:
            raise ValueError(f"batch must be positive, not {batch}")
        done, shape = 0, None
        for images in self._read(batch):
            shape = shape or images.shape[1:]
            if images.shape[1:] != shape:
                raise InvalidArgumentError(
                    f"{self.description}: images differ in size, {_size(shape)} and {_size(images.shape[1:])}; "
                    "set preprocessing.resize and preprocessing.center_crop",
                    field="dataset.preprocessing",
                )
            count = min(len(images), len(self) - done)
            yield images[:count], self.labels[done : done + count]
            done += count
            if done == len(self):
                return
        raise InvalidArgumentError(
            f"{self.description} has {len(self)} labels but only {done} images could be read", field="dataset"
        )

    def require(self, input_shape: Sequence[int], num_classes: int) -> None:
        """Check that a model can be measured on this set.

        Args:
            input_shape: Channels, height and width that the model takes.
            num_classes: Number of the model's logits.

        Raises:
            InvalidArgumentError: A label is not below ``num_classes``, or the first image, preprocessed, has another
                shape.
        """
        largest = int(self.labels.max())
        if largest >= num_classes:
            raise InvalidArgumentError(
                f"{self.description} has label {largest}, but the model has only the classes 0 to {num_classes - 1}",
                field="dataset",
            )
        first = next(self.images(1))[0]
        if first.shape[1:] != tuple(input_shape):
            raise InvalidArgumentError(
                f"{self.description} gives images of {_size(first.shape[1:])} after preprocessing, "
                f"but the model takes {_size(input_shape)}",
                field="dataset.preprocessing",
            )


def _size(shape: Sequence[int]) -> str:
    return "×".join(str(n) for n in shape)


def regrouped(chunks: Iterable[NDArray[np.uint8]], batch: int) -> Iterator[NDArray[np.uint8]]:
    """Yield the rows of ``chunks``, arrays that agree in all axes but the first, ``batch`` at a time."""
    pending: list[NDArray[np.uint8]] = []
    count = 0
    for chunk in chunks:
        rest = chunk
        while len(rest):
            part, rest = rest[: batch - count], rest[batch - count :]
            pending.append(part)
            count += len(part)
            if count == batch:
                yield np.concatenate(pending)
                pending, count = [], 0
    if pending:
        yield np.concatenate(pending)


def limited(count: int, limit: int) -> int:
    """Return how many of ``count`` images Dataset.limit leaves; 0 means all."""
    return min(count, limit) if limit else count
