"""Pipelines and artifacts as the caller sees them: its own, as if there were no others; administrators see all."""

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing

from granq.v1 import artifacts_pb2, coordinator_pb2
from services.common.errors import NotFoundError
from services.common.principal import Principal, Scope, current_principal
from services.coordinator.calls import DatabaseCalls
from services.coordinator.grants import Grants, digests_of
from services.coordinator.manager import PipelineManager
from services.coordinator.repository import Repository
from services.coordinator.transfer import ArtifactTransfer


def _only_owner_of_artifacts(principal: Principal) -> str | None:
    # Devices that reach no store move the artifacts of everybody's jobs.
    return None if Scope.SERVICE in principal.scopes else principal.only_owner


class OwnArtifacts:
    """`ArtifactTransfer` for whoever calls.

    Args:
        transfer: Moves the blobs.
        grants: Who may see which.
        calls: Run calls of the database.
    """

    def __init__(self, transfer: ArtifactTransfer, grants: Grants, calls: DatabaseCalls) -> None:
        self._transfer = transfer
        self._grants = grants
        self._calls = calls

    async def require(self, digest: str, field: str = "") -> None:
        """Do nothing when the caller may see an artifact, or raise the NotFoundError of one that is not there."""
        owner = _only_owner_of_artifacts(current_principal())
        if owner is not None and not await self._calls.call(self._grants.holds, owner, digest):
            raise NotFoundError(f"the store does not hold {digest}", reason="ARTIFACT_NOT_FOUND", field=field)

    async def receive(self, messages: AsyncIterator[artifacts_pb2.UploadArtifactRequest]) -> artifacts_pb2.Artifact:
        """Store a blob, which is then the caller's, too; raises as `ArtifactTransfer.receive` does."""
        artifact = await self._transfer.receive(messages)
        await self._calls.call(self._grants.uploaded, current_principal().name, artifact)
        return artifact

    async def send(self, digest: str, offset: int) -> AsyncGenerator[artifacts_pb2.DownloadArtifactResponse, None]:
        """Yield a blob's bytes; raises as `ArtifactTransfer.send` does."""
        await self.require(digest)
        async with aclosing(self._transfer.send(digest, offset)) as messages:
            async for message in messages:
                yield message

    async def stat(self, digest: str) -> artifacts_pb2.Artifact:
        """Return a blob's identity, or raise NotFoundError."""
        await self.require(digest)
        return await self._transfer.stat(digest)


class OwnPipelines:
    """`PipelineManager` for whoever calls; raises as it does.

    Args:
        manager: All pipelines.
        repository: Whose they are.
        calls: Run calls of the database.
        artifacts: What a pipeline may be made of.
    """

    def __init__(
        self, manager: PipelineManager, repository: Repository, calls: DatabaseCalls, artifacts: OwnArtifacts
    ) -> None:
        self._manager = manager
        self._repository = repository
        self._calls = calls
        self._artifacts = artifacts

    async def _require(self, pipeline_id: str) -> None:
        owner = current_principal().only_owner
        # An owner never changes, so what follows need not ask again.
        if owner is not None and await self._calls.call(self._repository.owner, pipeline_id) != owner:
            raise NotFoundError(f"there is no pipeline {pipeline_id!r}", field="pipeline_id")

    async def submit(self, spec: coordinator_pb2.PipelineSpec, request_id: str) -> coordinator_pb2.Pipeline:
        """Start a pipeline that is the caller's."""
        for name, part in (("model", spec.model), ("dataset", spec.dataset)):
            for digest in digests_of(part):
                await self._artifacts.require(digest, f"spec.{name}.artifact")
        return await self._manager.submit(spec, request_id, current_principal().name)

    async def get(self, pipeline_id: str) -> coordinator_pb2.Pipeline:
        """Return a pipeline."""
        await self._require(pipeline_id)
        return await self._manager.get(pipeline_id)

    async def page(
        self, states: Sequence[int], page_size: int, page_token: str
    ) -> tuple[list[coordinator_pb2.Pipeline], str]:
        """Return a page of pipelines and the token of the next one."""
        return await self._manager.page(states, page_size, page_token, current_principal().only_owner)

    async def watch(self, pipeline_id: str, after: int) -> AsyncGenerator[coordinator_pb2.WatchPipelineResponse, None]:
        """Yield a pipeline's events behind a number until it has ended."""
        await self._require(pipeline_id)
        async with aclosing(self._manager.watch(pipeline_id, after)) as events:
            async for event in events:
                yield event

    async def cancel(self, pipeline_id: str) -> coordinator_pb2.Pipeline:
        """Begin to stop a pipeline."""
        await self._require(pipeline_id)
        return await self._manager.cancel(pipeline_id)

    async def retry(self, pipeline_id: str) -> coordinator_pb2.Pipeline:
        """Continue a pipeline."""
        await self._require(pipeline_id)
        return await self._manager.retry(pipeline_id)

    async def delete(self, pipeline_id: str) -> None:
        """Remove a pipeline."""
        await self._require(pipeline_id)
        await self._manager.delete(pipeline_id)
