"""Whether an inner optimizer's state should follow a path that another peer takes over.

Every few rounds each path goes to another peer, which begins with a new AdamW that warms up, with
the state that it was left with when it last trained the path, or with the state of the peer before:
exact, or in 8 bits, as a swarm hands it over. In `staying` no path ever moves.

    python -m benchmarks.handover [--config FILE] [--rounds 30] [--steps 20] [--every 1]
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click

from benchmarks.lockstep import Lockstep, compare, settings
from dipaco.moments import decode_moments, encode_moments
from dipaco.optimizer import saved_moments
from dipaco.start import Start
from peer.path_files import OPTIMIZER_SUFFIX
from peer.path_work import PathWork

Give = Callable[[Path, PathWork], None]
"""Lets a peer that begins on a path have something of the optimizer that its last one saved."""


def nothing(file: Path, work: PathWork) -> None:
    """It has what it has."""


def exactly(file: Path, work: PathWork) -> None:
    """The state as it is."""
    work.handed_over = saved_moments(file)


def in_8_bits(file: Path, work: PathWork) -> None:
    """The state as it comes over the wire."""
    moments = saved_moments(file)
    assert moments is not None, "it was saved just now"
    work.handed_over = decode_moments(
        encode_moments(moments),
        num_parameters=len(moments.mean),
        config=work.trainer.config.inner,
    )


def train(
    start: Start, directory: Path, *, every: int, num_peers: int = 1000, give: Give = nothing
) -> float:
    """The loss at the end of a run in which `num_peers` take turns on each path."""
    swarm, rounds = Lockstep(start, directory / "0"), start.config.rounds
    for slot in range(rounds.num_rounds):
        swarm.train(0, rounds.inner_steps)
        swarm.average(slot)
        swarm.arrive(slot)
        turn, rest = divmod(slot + 1, every)
        if num_peers > 1 and not rest:
            old, new = (directory / str(number % num_peers) for number in (turn - 1, turn))
            for work in swarm.works.values():
                work.save()
            swarm.begin(new)
            for path, work in swarm.works.items():
                give(old / str(path) / f"{path}{OPTIMIZER_SUFFIX}", work)
    return swarm.loss()


@click.command()
@settings
@click.option("--every", type=int, default=1, show_default=True, help="Rounds between two moves.")
def main(every: int, **options: Any) -> None:
    """Compare what an optimizer may begin with on a path that was another peer's."""
    moving = partial(train, every=every)
    ways = {
        "staying": partial(moving, num_peers=1),
        "new, warms up": moving,
        "its own, of two peers that take turns": partial(moving, num_peers=2),
        "handed over": partial(moving, give=exactly),
        "handed over in 8 bits": partial(moving, give=in_8_bits),
    }
    compare(ways, what="the optimizer's state", **options)


if __name__ == "__main__":
    main()
