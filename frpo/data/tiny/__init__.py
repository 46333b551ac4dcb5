"""A world small enough for a laptop: questions about invented objects, answers that can be graded, a corpus."""

from frpo.data.tiny.source import TinySource, demonstrations

__all__ = ["TinySource", "demonstrations"]
