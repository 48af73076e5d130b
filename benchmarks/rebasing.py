"""What it costs that versions arrive late, and training goes on: re-basing against blocking.

The outer gradients of a slot are averaged at its end; the versions that come of it reach the paths
a share of the next slot later, and are put under what was trained meanwhile. Share 0 is an exact,
blocking run.

    python -m benchmarks.rebasing [--config FILE] [--rounds 30] [--steps 20] [--json FILE]
"""

from functools import partial
from pathlib import Path
from typing import Any

import click

from benchmarks.lockstep import Lockstep, compare, settings
from dipaco.start import Start

SHARES_LATE = (0.0, 0.1, 0.5, 1.0)
MAX_COST = 0.01


def train(start: Start, directory: Path, *, share_late: float) -> float:
    """The loss at the end of a run whose versions arrive `share_late` of a slot late."""
    swarm, rounds = Lockstep(start, directory), start.config.rounds
    steps_late = round(share_late * rounds.inner_steps)
    for slot in range(rounds.num_rounds):
        swarm.train(0, steps_late)
        if slot:
            swarm.arrive(slot - 1)
        swarm.train(steps_late, rounds.inner_steps - steps_late)
        swarm.average(slot)
    return swarm.loss()


@click.command()
@settings
def main(**options: Any) -> None:
    """Compare versions that arrive late with versions that are waited for."""
    ways = {str(share): partial(train, share_late=share) for share in SHARES_LATE}
    losses = compare(ways, what="late by, slots", **options)
    if max(losses.values()) > (1 + MAX_COST) * losses["0.0"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
