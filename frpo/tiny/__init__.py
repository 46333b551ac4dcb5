"""A world small enough for a laptop: questions about invented objects, answers that can be graded, a corpus."""

from frpo.tiny.sources import TinyDemonstrations, TinySource, demonstrations

__all__ = ["TinyDemonstrations", "TinySource", "demonstrations"]
