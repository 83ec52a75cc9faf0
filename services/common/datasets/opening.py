"""From a request's Dataset to a reader."""

from pathlib import Path
from typing import TYPE_CHECKING

from granq.v1 import artifacts_pb2, common_pb2
from services.common.datasets.base import LabelledSet
from services.common.datasets.cifar import CifarSet
from services.common.datasets.folder import ImageFolder
from services.common.datasets.idx import IdxSet
from services.common.datasets.npz import NpzSet
from services.common.datasets.paths import resolve_under
from services.common.datasets.preprocessing import Preprocessor
from services.common.datasets.webdataset import WebDataset
from services.common.errors import InvalidArgumentError

if TYPE_CHECKING:
    from services.common.artifacts import ArtifactStore


def dataset_artifact(dataset: common_pb2.Dataset) -> artifacts_pb2.Artifact | None:
    """Return the artifact that a set was uploaded as; None for a set of the server's own."""
    return dataset.artifact if dataset.WhichOneof("source") == "artifact" else None


def open_dataset(dataset: common_pb2.Dataset, root: Path, store: "ArtifactStore") -> LabelledSet:
    """Open a labelled set; headers and sizes are checked now, images are read when asked for.

    Args:
        dataset: What the request names. Errors call its fields "dataset.…".
        root: Folder that Dataset.path is relative to and cannot leave.
        store: Holds Dataset.artifact.

    Raises:
        InvalidArgumentError: The set is missing, damaged, or not of the named format.
        FailedPreconditionError: The dataset root does not exist.
        NotFoundError: The store does not hold the artifact.
    """
    preprocess = Preprocessor(dataset.preprocessing)
    if dataset.WhichOneof("source") == "artifact":
        if dataset.format != common_pb2.DATASET_FORMAT_NPZ:
            raise InvalidArgumentError(
                "an uploaded dataset must be a NumPy archive (DATASET_FORMAT_NPZ); name folders by path",
                field="dataset.format",
            )
        digest = dataset.artifact.digest
        return NpzSet(store.local_path(digest), dataset.limit, preprocess, digest, "dataset.artifact")
    target = resolve_under(root, dataset.path, "dataset.path")
    match dataset.format:
        case common_pb2.DATASET_FORMAT_IDX:
            return IdxSet(root, target, dataset.split, dataset.limit, preprocess, dataset.path)
        case common_pb2.DATASET_FORMAT_NPZ:
            return NpzSet(target, dataset.limit, preprocess, dataset.path, "dataset.path")
        case common_pb2.DATASET_FORMAT_IMAGE_FOLDER:
            return ImageFolder(root, target, dataset.limit, preprocess, dataset.path)
        case common_pb2.DATASET_FORMAT_CIFAR:
            return CifarSet(root, target, dataset.split, dataset.limit, preprocess, dataset.path)
        case common_pb2.DATASET_FORMAT_WEBDATASET:
            return WebDataset(root, target, dataset.limit, preprocess, dataset.path)
    raise InvalidArgumentError("dataset.format must be set", field="dataset.format")
