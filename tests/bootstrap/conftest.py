"""The fixtures of the tiny run."""

from tests.tiny_run import small_footprint, start, text_files, tiny

__all__ = ["small_footprint", "start", "text_files", "tiny"]
