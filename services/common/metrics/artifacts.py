"""What the artifact store tells of its traffic. Jobs' processes hand theirs over to their server (`relay`)."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import Counter

ARTIFACT_BYTES = Counter("granq_artifact_bytes", "Bytes moved to (write) and from (read) the store.", ["direction"])
ARTIFACT_OPERATIONS = Counter("granq_artifact_operations", "Operations on the store's files or objects.", ["operation"])
ARTIFACT_SECONDS = Counter("granq_artifact_operation_seconds", "Time that these operations took.", ["operation"])
ARTIFACT_ERRORS = Counter(
    "granq_artifact_errors", "Operations that failed; a file that is not there is no failure.", ["operation"]
)
CACHE_REMOVED_BYTES = Counter(
    "granq_artifact_cache_removed_bytes",
    "Bytes of local copies of remote artifacts that made room for others.",
)

OPERATIONS = ("open", "read", "write", "flush", "publish", "stat", "replace", "delete", "list")
for _operation in OPERATIONS:
    # From the start, so that the first one shows as an increase.
    for _counter in (ARTIFACT_OPERATIONS, ARTIFACT_SECONDS, ARTIFACT_ERRORS):
        _counter.labels(_operation)
for _direction in ("write", "read"):
    ARTIFACT_BYTES.labels(_direction)


@contextmanager
def artifact_operation(operation: str) -> Iterator[None]:
    """Count and time one of `OPERATIONS`, and its failure."""
    began = time.monotonic()
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception:
        ARTIFACT_ERRORS.labels(operation).inc()
        raise
    finally:
        ARTIFACT_OPERATIONS.labels(operation).inc()
        ARTIFACT_SECONDS.labels(operation).inc(time.monotonic() - began)
