"""A path as it was when it did best."""

from pathlib import Path

import numpy as np
import torch

from dipaco.early_stopping import keep_if_best, read_best
from dipaco.evaluate import Evaluation
from dipaco.topology import ModuleID


def at(nll: float) -> Evaluation:
    return Evaluation(nll_sum=nll, num_tokens=1)


def test_what_did_best_on_the_same_rows_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "0.1.best"
    module = ModuleID(0, 0)
    sizes = {module: 5}

    def keep(value: float, nll: float, round_number: int, shard: int = 0) -> bool:
        parameters, rows = {module: torch.full((5,), value)}, np.full((2, 3), shard, np.uint16)
        return keep_if_best(file, parameters, at(nll), rows=rows, round_number=round_number)

    assert read_best(file, sizes) is None
    nothing, no_rows = Evaluation(nll_sum=0, num_tokens=0), np.empty((0, 3), np.uint16)
    assert not keep_if_best(file, {}, nothing, rows=no_rows, round_number=0)
    assert keep(1.0, 3.0, 1)
    assert keep(2.0, 2.0, 2)
    assert not keep(3.0, 2.5, 3)
    best = read_best(file, sizes)
    assert best is not None
    assert (best.round, float(best.parameters[module][0])) == (2, 2.0)
    assert best.is_on(np.zeros((2, 3), np.uint16))
    assert not best.is_on(np.ones((2, 3), np.uint16))
    assert not best.is_on(no_rows)
    assert keep(4.0, 2.5, 4, shard=1), "another shard is another measure"
    assert read_best(file, {module: 6}) is None, "of another model"
    file.write_bytes(file.read_bytes()[:-1])
    assert read_best(file, sizes) is None
    assert keep(5.0, 9.0, 5), "what is damaged is replaced"
