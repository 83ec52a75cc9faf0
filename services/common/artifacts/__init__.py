"""The content-addressed artifact store that all services share."""

from services.common.artifacts.store import ArtifactStore, ArtifactWriter

__all__ = ["ArtifactStore", "ArtifactWriter"]
