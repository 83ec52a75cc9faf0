"""What the store keeps of a job beyond its server's life: what was asked, and what came out."""

import hashlib

from google.protobuf.message import Message

from granq.v1 import jobs_pb2
from services.common.artifacts import ArtifactStore
from services.common.errors import AlreadyExistsError
from services.common.jobs.context import checkpoint_ref
from services.common.jobs.lease import release_quietly


def request_digest(kind: str, request: Message) -> str:
    """Return a digest that is the same for the same work, whoever asks: the key of the job is left out."""
    bare = type(request)()
    bare.CopyFrom(request)
    if "key" in request.DESCRIPTOR.fields_by_name:
        bare.ClearField("key")
    content = bare.SerializeToString(deterministic=True)
    return hashlib.sha256(b"\0".join((kind.encode(), request.DESCRIPTOR.full_name.encode(), content))).hexdigest()


def other_request(job_id: str) -> AlreadyExistsError:
    """Return the error for a job id that is taken by another request."""
    return AlreadyExistsError(
        f"the job {job_id!r} exists with another request; choose another id",
        reason="JOB_ID_TAKEN",
        field="key.job_id",
    )


class JobRecords:
    """Records of jobs in the store. Methods block; call them in a thread."""

    def __init__(self, store: ArtifactStore) -> None:
        self._store = store

    def claim(self, job_id: str, digest: str) -> None:
        """Note the request that a job id stands for from now on.

        Raises:
            AlreadyExistsError: It stands for another one.
        """
        name = f"jobs/{job_id}/request"
        known = self._store.get_ref(name)
        if known is None and not self._store.create_ref(name, digest.encode()):
            known = self._store.get_ref(name)  # another worker was asked at the same moment
        if known is not None and known.decode() != digest:
            raise other_request(job_id)

    def load_success(self, job_id: str) -> tuple[jobs_pb2.Job, str] | None:
        """Return a job that ended with a result, and its request's digest; None where there is none."""
        data = self._store.get_ref(f"jobs/{job_id}/result")
        digest = self._store.get_ref(f"jobs/{job_id}/request")
        return None if data is None or digest is None else (jobs_pb2.Job.FromString(data), digest.decode())

    def save_success(self, job: jobs_pb2.Job) -> None:
        """Keep a job that ended with a result; nobody resumes it any more."""
        self._store.set_ref(f"jobs/{job.key.job_id}/result", job.SerializeToString())
        self._store.delete_ref(checkpoint_ref(job.key.job_id))

    def release(self, job_id: str, run_id: str) -> None:
        """Let other workers run a job, because the process of this run has ended."""
        release_quietly(self._store, job_id, run_id)
