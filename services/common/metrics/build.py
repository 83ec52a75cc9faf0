"""What runs here."""

import platform
from importlib.metadata import version

from prometheus_client import Gauge

BUILD = Gauge("granq_build_info", "1; its labels tell what runs.", ["service", "version", "python"])


def show_build(service: str) -> None:
    """Show the version of this process."""
    BUILD.labels(service, version("granq-pipeline"), platform.python_version()).set(1)
