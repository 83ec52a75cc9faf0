"""Work that takes longer than a call: jobs in processes of their own, followed and ended through one manager."""

from services.common.jobs.context import JobContext
from services.common.jobs.manager import JobManager

__all__ = ["JobContext", "JobManager"]
