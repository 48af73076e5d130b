"""A path as it was when it did best."""

from pathlib import Path

import torch

from dipaco.evaluate import Evaluation
from dipaco.topology import ModuleID
from peer.best import keep_if_best, read_best


def at(nll: float) -> Evaluation:
    return Evaluation(nll_sum=nll, num_tokens=1)


def test_what_did_best_on_the_same_rows_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "0.1.best"
    module = ModuleID(0, 0)

    def keep(value: float, nll: float, round_number: int, rows: str = "a" * 64) -> bool:
        parameters = {module: torch.full((5,), value)}
        return keep_if_best(file, parameters, at(nll), rows=rows, round_number=round_number)

    assert read_best(file) is None
    assert not keep_if_best(file, {}, Evaluation(nll_sum=0, num_tokens=0), rows="", round_number=0)
    assert keep(1.0, 3.0, 1)
    assert keep(2.0, 2.0, 2)
    assert not keep(3.0, 2.5, 3)
    best = read_best(file)
    assert best is not None
    assert (best.round, float(best.parameters[module][0])) == (2, 2.0)
    assert keep(4.0, 2.5, 4, rows="b" * 64), "another shard is another measure"
    file.write_bytes(file.read_bytes()[:-1])
    assert read_best(file) is None
    assert keep(5.0, 9.0, 5), "what is damaged is replaced"
