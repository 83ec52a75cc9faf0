"""Synthetic sets as the generator writes them."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from services.common.errors import InvalidArgumentError
from services.common.synthetic import held_out

FIELD = "synthetic_set"


class SyntheticSet:
    """The held-out images of a safetensors file and the teacher's logits, read batch by batch.

    The images before them may have trained what is measured, and are left out. So are the labels: they are what the
    images were made for, not truth.

    Args:
        path: The file, with "images" float32 N×C×H×W and "logits" float32 N×K.

    Raises:
        InvalidArgumentError: The file is damaged, or a tensor is missing or has a wrong type or shape.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with safe_open(path, framework="numpy") as file:
                names = set(file.keys())
                if not {"images", "logits"} <= names:
                    raise InvalidArgumentError(
                        f'the set must hold "images" and "logits", it holds {sorted(names)[:10]}', field=FIELD
                    )
                slices = {name: file.get_slice(name) for name in ("images", "logits")}
                self._shape = tuple(slices["images"].get_shape())
                self._logits = tuple(slices["logits"].get_shape())
                types = {s.get_dtype() for s in slices.values()}
        except (SafetensorError, OSError) as error:
            raise InvalidArgumentError(f"not a readable safetensors file: {error}", field=FIELD) from error
        if types != {"F32"} or len(self._shape) != 4 or len(self._logits) != 2 or self._shape[0] != self._logits[0]:
            raise InvalidArgumentError(
                f"the set must hold float32 images N×C×H×W and logits N×K, not {sorted(types)} of shapes "
                f"{self._shape} and {self._logits}",
                field=FIELD,
            )
        if not self._shape[0]:
            raise InvalidArgumentError("the set holds no images", field=FIELD)
        self._first = int(self._shape[0]) - held_out(int(self._shape[0]))

    def __len__(self) -> int:
        return int(self._shape[0]) - self._first

    def require(self, input_shape: Sequence[int], num_classes: int) -> None:
        """Raise InvalidArgumentError unless a model with this input (C, H, W) and this many classes fits the set."""
        if self._shape[1:] != tuple(input_shape) or self._logits[1] != num_classes:
            raise InvalidArgumentError(
                f"the set was made for input {self._shape[1:]} and {self._logits[1]} classes, "
                f"but the model takes {tuple(input_shape)} and has {num_classes}",
                field=FIELD,
            )

    def batches(self, count: int) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
        """Yield (images, teacher logits), ``count`` at a time and fewer at the end.

        Raises:
            InvalidArgumentError: Values are infinite or NaN.
        """
        with safe_open(self._path, framework="numpy") as file:
            images, logits = file.get_slice("images"), file.get_slice("logits")
            for start in range(self._first, self._shape[0], count):
                end = min(start + count, self._shape[0])
                pair = images[start:end], logits[start:end]
                if not all(np.isfinite(part).all() for part in pair):
                    raise InvalidArgumentError("images and logits must be finite numbers", field=FIELD)
                yield pair
