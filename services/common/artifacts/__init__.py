"""The content-addressed artifact store that all services share."""

from services.common.artifacts.store import ArtifactStore
from services.common.artifacts.writer import ArtifactWriter

__all__ = ["ArtifactStore", "ArtifactWriter"]
