"""Readers of labelled image sets (NumPy archives, image folders, IDX, CIFAR, WebDataset). No torch."""

from services.common.datasets.base import LabelledSet
from services.common.datasets.opening import dataset_artifact, open_dataset
from services.common.datasets.preprocessing import Preprocessor

__all__ = ["LabelledSet", "Preprocessor", "dataset_artifact", "open_dataset"]
