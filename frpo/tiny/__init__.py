"""A world small enough for a laptop: questions about invented objects, answers that can be graded, a corpus."""

from frpo.tiny.sources import TinyDemonstrations, TinySource

__all__ = ["TinyDemonstrations", "TinySource"]
