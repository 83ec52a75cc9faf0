"""Fixtures that every test may use."""

import os
from pathlib import Path

import pytest

# PostgreSQL is started by a true fork, since it needs another account. gRPC's handlers for that now and then crash the
# forked process while threads are busy; they have no use here, where what is forked runs another program at once.
# Without a GPU its kernels are run by Triton's interpreter. It has to be chosen before anything imports Triton.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "false")

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with the conformance vectors and a model this project did not write; beside the repository, not in it."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"conformance data is not on this machine: {folder} does not exist")
    return folder


@pytest.fixture(scope="session")
def fashion_mnist() -> Path:
    """Folder with the Fashion-MNIST IDX files of Debian's dataset-fashion-mnist."""
    folder = Path("/usr/share/datasets/fashion-mnist")
    if not (folder / "t10k-images-idx3-ubyte.gz").is_file():
        pytest.skip("Fashion-MNIST is not installed: apt-get install dataset-fashion-mnist")
    return folder
