"""Promises and progress while peers keep leaving, killed or not, and coming back."""

from pathlib import Path

from tests.churn import Churn, soak
from tests.little_run import little_config
from tests.virtual_clock import run_virtual


def test_modules_go_on_while_peers_come_and_go(tmp_path: Path) -> None:
    config = little_config(num_rounds=100, blocking=False)
    churn = Churn(num_peers=6, num_slots=8, step_seconds=4.0, seed=1)
    outcome = run_virtual(soak(config, tmp_path, churn))
    assert outcome.num_killed >= 3
    assert outcome.num_left >= 3
    assert not outcome.violations
    assert outcome.possible >= 20
    assert outcome.committed >= 0.95 * outcome.possible, outcome.missed
