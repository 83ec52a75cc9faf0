"""JobService of a worker."""

from collections.abc import AsyncIterator
from typing import Any

import grpc

from granq.v1 import jobs_pb2, jobs_pb2_grpc
from services.common.jobs.manager import JobManager


class JobServicer(jobs_pb2_grpc.JobServiceServicer):
    """Answers for the jobs of one manager."""

    def __init__(self, jobs: JobManager) -> None:
        self._jobs = jobs

    async def GetJob(  # noqa: N802
        self, request: jobs_pb2.GetJobRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> jobs_pb2.GetJobResponse:
        """Return a job."""
        return jobs_pb2.GetJobResponse(job=await self._jobs.get(request.job_id))

    async def ListJobs(  # noqa: N802
        self, request: jobs_pb2.ListJobsRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> jobs_pb2.ListJobsResponse:
        """Return all jobs."""
        return jobs_pb2.ListJobsResponse(jobs=self._jobs.list())

    async def WatchJob(  # noqa: N802
        self, request: jobs_pb2.WatchJobRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[jobs_pb2.WatchJobResponse]:
        """Stream a job's events."""
        async for event in self._jobs.watch(request.job_id, request.after_sequence, request.run_id):
            yield event

    async def CancelJob(  # noqa: N802
        self, request: jobs_pb2.CancelJobRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> jobs_pb2.CancelJobResponse:
        """Ask a job to stop."""
        return jobs_pb2.CancelJobResponse(job=await self._jobs.cancel(request.job_id))
