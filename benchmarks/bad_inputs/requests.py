"""Requests that contradict themselves, what is stored, or what may be reached."""

from collections.abc import Callable, Iterator

from benchmarks.bad_inputs.models import Ask
from granq.v1 import artifacts_pb2, common_pb2, coordinator_pb2

SUBMIT, UPLOAD = "SubmitPipeline", "UploadArtifact"
Change = Callable[[coordinator_pb2.PipelineSpec], object]


def _batch(low: int, best: int, high: int) -> Change:
    profile = common_pb2.BatchProfile(min=low, opt=best, max=high)
    return lambda spec: spec.engines.add(batch=profile)


def _path(path: str) -> Change:
    dataset = common_pb2.Dataset(path=path, format=common_pb2.DATASET_FORMAT_IMAGE_FOLDER)
    return lambda spec: spec.dataset.CopyFrom(dataset)


def cases() -> Iterator[tuple[str, str, Ask]]:
    """Yield requests, as `models.cases` does."""
    absent = "sha256:" + "0" * 64
    changes: dict[str, Change] = {
        "model with a digest that nothing has": lambda spec: setattr(spec.model.artifact, "digest", absent),
        "model with a digest that is none": lambda spec: setattr(
            spec.model.artifact, "digest", "sha256:../../etc/passwd"
        ),
        "model with a wrong size": lambda spec: setattr(spec.model.artifact, "size_bytes", 1),
        "batch profile 8/4/2 (min above max)": _batch(8, 4, 2),
        "batch profile 0/1/2": _batch(0, 1, 2),
        "dataset path ../../etc": _path("../../etc"),
        "dataset path /etc": _path("/etc"),
        "weights of 1 bit": lambda spec: setattr(spec.quantization, "weight_bits", 1),
        "2**31 - 1 synthetic images": lambda spec: setattr(spec.synthesis, "num_images", 2**31 - 1),
        "learning rate NaN": lambda spec: setattr(spec.training, "learning_rate", float("nan")),
    }

    def sent(change: Change) -> Ask:
        return lambda bench: bench.submit(change)

    for name, change in changes.items():
        yield name, SUBMIT, sent(change)
    headers = {
        "upload whose digest is another's": artifacts_pb2.UploadHeader(digest=absent),
        "upload that is longer than declared": artifacts_pb2.UploadHeader(size_bytes=1),
        "upload declared as 1 TiB": artifacts_pb2.UploadHeader(size_bytes=1 << 40),
        "upload named ../../x": artifacts_pb2.UploadHeader(name="../../x"),
    }

    def uploaded(header: artifacts_pb2.UploadHeader) -> Ask:
        return lambda bench: bench.upload(header, b"content")

    for name, header in headers.items():
        yield name, UPLOAD, uploaded(header)
