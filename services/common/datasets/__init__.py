"""Readers of labelled image sets: IDX, NumPy archives and image folders, with their preprocessing. No torch."""

from services.common.datasets.base import LabelledSet
from services.common.datasets.opening import open_dataset
from services.common.datasets.preprocessing import Preprocessor

__all__ = ["LabelledSet", "Preprocessor", "open_dataset"]
