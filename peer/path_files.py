"""What a peer keeps on disk of the paths that it trains: a few files of each, in one directory."""

from contextlib import suppress
from pathlib import Path

OPTIMIZER_SUFFIX, RESIDUAL_SUFFIX, BEST_SUFFIX = ".optimizer", ".residuals", ".best"
PATHS_KEPT = 8  # with their optimizers' states: 8 bytes per parameter each


def path_trained_last(directory: Path) -> str | None:
    """The name of the path whose optimizer was saved last; None if none was."""
    saved_ns: dict[str, int] = {}
    for file in directory.glob(f"*{OPTIMIZER_SUFFIX}"):
        with suppress(FileNotFoundError):  # a running peer drops old ones
            saved_ns[file.stem] = file.stat().st_mtime_ns
    return max(saved_ns, key=saved_ns.__getitem__, default=None)


def drop_oldest(directory: Path, *, max_paths: int) -> None:
    """Delete what is kept of the paths that were trained longest ago; `max_paths` remain."""
    by_path: dict[str, list[Path]] = {}
    for file in directory.iterdir():
        if file.suffix in (OPTIMIZER_SUFFIX, RESIDUAL_SUFFIX, BEST_SUFFIX):
            by_path.setdefault(file.stem, []).append(file)
    newest_first = sorted(
        by_path.values(), key=lambda files: max(f.stat().st_mtime_ns for f in files), reverse=True
    )
    for files in newest_first[max_paths:]:
        for file in files:
            file.unlink(missing_ok=True)
