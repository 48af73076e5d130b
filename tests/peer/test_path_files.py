"""How many paths stay on disk."""

import os
from pathlib import Path

from peer.path_files import drop_oldest


def test_the_optimizers_of_the_paths_trained_longest_ago_are_dropped_first(tmp_path: Path) -> None:
    for number in range(5):
        for suffix in (".optimizer", ".residuals"):
            file = tmp_path / f"0.{number}{suffix}"
            file.write_bytes(bytes(100))
            os.utime(file, (number, number))

    def left() -> list[str]:
        return sorted({file.stem for file in tmp_path.iterdir()})

    drop_oldest(tmp_path, max_paths=4)
    assert left() == ["0.1", "0.2", "0.3", "0.4"]
    drop_oldest(tmp_path, max_paths=1)
    assert left() == ["0.4"], "what is trained now stays"
