"""Assembly of the evaluator's server, and its life as a device of a pool."""

import asyncio

from granq.v1 import evaluator_pb2_grpc
from services.common.artifacts import ArtifactStore
from services.common.artifacts.cache import default_cache_dir
from services.common.jobs import JobManager
from services.common.rpc import GrpcServer
from services.evaluator.coordinator_client import CoordinatorClient
from services.evaluator.device_info import device_info
from services.evaluator.enrolment import Enrolment
from services.evaluator.identity import Identity
from services.evaluator.metrics import observe
from services.evaluator.servicer import EvaluatorServicer
from services.evaluator.serving import CallServing
from services.evaluator.settings import EvaluatorSettings
from services.evaluator.starting import KINDS, JobStarter

POOL_HEALTH = "device-pool"
"""Name in the health service that tells whether this evaluator is in the pool."""
_CALL_SECONDS = 5.0


class EvaluatorServer(GrpcServer):
    """The evaluator's server, which is in the coordinator's pool while it serves, where the settings name one.

    Args:
        settings: The evaluator's settings.
    """

    def __init__(self, settings: EvaluatorSettings) -> None:
        store = ArtifactStore.of(settings)
        self._runner = JobManager(store, settings, KINDS, settings.max_running_jobs, on_success=observe)
        super().__init__("evaluator", settings, self._runner)
        self._configured = settings
        self._starter = JobStarter(self._runner)
        self.add(evaluator_pb2_grpc.add_EvaluatorServiceServicer_to_server, EvaluatorServicer(self._starter))
        self._membership: tuple[Enrolment, CoordinatorClient, Identity] | None = None

    async def start(self) -> None:
        """Listen, report SERVING, and begin to enter the pool.

        Raises:
            UnavailableError: A port is taken, or the host is not this machine's.
            FailedPreconditionError: Another process of this machine has the device's name.
        """
        settings = self._configured
        if not settings.coordinator_address:
            await super().start()
            return
        identity = await asyncio.to_thread(Identity, settings.cache_dir or default_cache_dir(), settings.device_id)
        try:
            await self.report(POOL_HEALTH, serving=False)
            await super().start()
        except BaseException:
            identity.close()
            raise
        client = CoordinatorClient(
            settings.coordinator_address,
            settings,
            max_message_bytes=settings.max_message_bytes,
            timeout_seconds=_CALL_SECONDS,
        )
        serving = CallServing(self._starter, self._runner)

        async def serve() -> None:
            await client.serve(identity.device_id, identity.instance_id, serving)

        async def tell(registered: bool) -> None:
            await self.report(POOL_HEALTH, serving=registered)

        enrolment = Enrolment(
            coordinator=client,
            identity=identity,
            info=await asyncio.to_thread(device_info, settings, self._address()),
            interrupt=self._runner.interrupt,
            serve=serve if settings.dial_out else None,
            report=tell,
        )
        self._membership = (enrolment, client, identity)
        enrolment.start()

    def _address(self) -> str:
        settings = self._configured
        if settings.dial_out:
            return ""
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        return settings.device_address or f"{host}:{self.port}"

    async def stop(self, grace: float | None = None) -> None:
        """Take no more jobs, end those that run, leave the pool, and stop."""
        membership, self._membership = self._membership, None
        if membership is None:
            await super().stop(grace)
            return
        enrolment, client, identity = membership
        await enrolment.stop()
        await super().stop(grace)
        # Only now: from the goodbye on the coordinator may begin the jobs elsewhere.
        await enrolment.say_goodbye()
        await client.close()
        identity.close()


def create_server(settings: EvaluatorSettings) -> EvaluatorServer:
    """Return the server, not yet started. Call within the event loop that it will run in."""
    if settings.dial_out and "artifact_url" not in settings.model_fields_set:
        url = f"granq://{settings.coordinator_address}"
        settings = settings.model_copy(update={"artifact_url": url})
    return EvaluatorServer(settings)
