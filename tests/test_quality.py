"""What the comparisons of `benchmarks.quality` say of a part of them."""

from pathlib import Path

from click.testing import CliRunner

from benchmarks.quality.__main__ import main
from benchmarks.quality.report import write_markdown

FIGURES = {"steps": 10, "tokens": 1e6, "flops": 1e12, "epochs": 1.0, "train_seconds": 1.0}


def test_a_ratio_to_a_model_that_was_not_trained_is_left_empty(tmp_path: Path) -> None:
    def ratios(**perplexities: float) -> list[str]:
        figures = {name: FIGURES | {"ppl": ppl} for name, ppl in perplexities.items()}
        write_markdown(figures, tmp_path / "quality.md")
        rows = (tmp_path / "quality.md").read_text().split("**routers**")[0].splitlines()
        cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows if "|" in row]
        return [row[cells[0].index("ppl / dense")] for row in cells[2:]]

    assert ratios(**{"2x2": 20.0}) == [""]
    assert ratios(**{"dense": 25.0, "2x2": 20.0}) == ["1.000", "0.800"]


def test_an_experiment_that_there_is_not_is_refused() -> None:
    done = CliRunner().invoke(main, ["--only", "typo"])
    assert done.exit_code == 2
    assert "Invalid value for --only: typo; accepted: dense, 2x2, " in done.stderr
