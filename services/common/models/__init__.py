"""Models of users: safe reading, capture as one kind of graph, and what was found in them. Needs torch."""

from services.common.models.loading import LoadedModel, load_model, summarize

__all__ = ["LoadedModel", "load_model", "summarize"]
