"""The fixtures of the tiny run."""

from tests.tiny_run import start, text_files, tiny

__all__ = ["start", "text_files", "tiny"]
