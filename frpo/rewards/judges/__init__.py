"""Judges of the field's benchmarks, as local models or over HTTP."""
