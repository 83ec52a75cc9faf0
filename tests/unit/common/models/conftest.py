from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from granq.v1 import common_pb2
from services.common.artifacts import ArtifactStore
from services.common.errors import InvalidArgumentError
from services.common.models import LoadedModel, load_model
from tests.support.models import Residual, settle
from tests.support.pt2 import export

SHAPE = (3, 8, 8)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(settle(Residual()), SHAPE, tmp_path_factory.mktemp("pt2") / "model.pt2")


Load = Callable[..., LoadedModel]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    store = ArtifactStore((tmp_path / "store").as_uri())

    def _load(path: Path, **source: object) -> LoadedModel:
        artifact = store.put_file(path)
        return load_model(common_pb2.ModelSource(artifact=artifact, **source), store)  # type: ignore[arg-type]

    return _load


@pytest.fixture
def refusal(load: Load) -> Callable[..., InvalidArgumentError]:
    def _refusal(path: Path, **source: object) -> InvalidArgumentError:
        with pytest.raises(InvalidArgumentError) as caught:
            load(path, **source)
        return caught.value

    return _refusal
