"""Structured logs on standard error, for the project's own records and for those of libraries alike."""

import logging
import sys
from collections.abc import Mapping
from typing import Literal

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from services.common.tracing import current_ids

get_logger = structlog.stdlib.get_logger
# At the level DEBUG these log the requests that they send, with keys and session tokens.
_TELL_TALES = ("aiobotocore", "aiohttp", "boto3", "botocore", "fsspec", "gcsfs", "google.auth", "s3fs", "urllib3")
AUDIT_LOGGER = "granq.audit"


def _add_trace(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    event.update(current_ids())
    return event


def configure_logging(
    log_format: Literal["console", "json"] = "console", level: str = "INFO", fields: Mapping[str, str] | None = None
) -> None:
    """Send all records of this process to standard error, one line each in JSON.

    Args:
        log_format: "console" for people, "json" for programs.
        level: Least level that is logged.
        fields: Constants of the process that every record carries, whichever thread or library writes it: the service,
            or in a job's process the job and the pipeline.
    """
    constants = {name: value for name, value in (fields or {}).items() if value}

    def add_constants(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
        for name, value in constants.items():
            event.setdefault(name, value)
        return event

    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        add_constants,
        _add_trace,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
    ]
    renderers: list[Processor]
    if log_format == "json":
        renderers = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(default=str)]
    else:
        # Plain, because tracebacks with the values of variables would show whatever a program holds: keys, tokens.
        plain = structlog.dev.plain_traceback
        renderers = [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=plain)]
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *renderers],
            foreign_pre_chain=[*shared, structlog.stdlib.ExtraAdder()],
        )
    )
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level)
    for library in _TELL_TALES:
        logging.getLogger(library).setLevel(max(root.level, logging.INFO))
    # What was done by whom is wanted even where nothing else is.
    logging.getLogger(AUDIT_LOGGER).setLevel(logging.INFO)
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            structlog.stdlib.PositionalArgumentsFormatter(),
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
