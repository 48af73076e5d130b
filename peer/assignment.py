"""Who trains which path, and who keeps which module: pure functions of a snapshot of the swarm.

Nobody assigns. Every peer computes the same assignment from (nearly) the same announcements, takes
its own line of it, and computes again at the next round; what two peers saw differently settles
then. Ties are broken by a hash of peer and path, so that joiners at the same instant spread out.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dipaco.topology import ModuleID, PathID

# A peer leaves a path for a neglected one only when that one is behind by more than this share of
# the whole run's progress per path: without a margin, peers would swap paths every round.
HYSTERESIS = 0.02


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """What a peer knows of the swarm when it chooses.

    `training`: path of every announced peer. `progress`: tokens trained per path over its shard's
    tokens, i.e. epochs; a path that nobody reports counts as 0.
    """

    training: Mapping[str, PathID]
    progress: Mapping[PathID, float]


def assign_paths(snapshot: Snapshot, paths: Sequence[PathID]) -> dict[str, PathID]:
    """The path of every announced peer.

    Each path gets as many peers as any other, within one, the most neglected ones first; a peer
    stays where it is as long as its path has room.
    """
    room = _capacities(snapshot, paths)
    assignment: dict[str, PathID] = {}
    homeless: list[str] = []
    for peer in sorted(snapshot.training, key=lambda peer: _rank(peer, snapshot.training[peer])):
        path = snapshot.training[peer]
        if room.get(path, 0) > 0:
            room[path] -= 1
            assignment[peer] = path
        else:
            homeless.append(peer)
    for peer in homeless:
        path = min(
            (path for path in room if room[path] > 0),
            key=lambda path: (-room[path], snapshot.progress.get(path, 0.0), _rank(peer, path)),
        )
        room[path] -= 1
        assignment[peer] = path
    return assignment


def choose_path(peer: str, snapshot: Snapshot, paths: Sequence[PathID]) -> PathID:
    """The path that `peer`, which trains none yet, should take.

    Fewest peers first, then most behind, then by hash.
    """
    counts = dict.fromkeys(paths, 0)
    for other, path in snapshot.training.items():
        if other != peer and path in counts:
            counts[path] += 1
    return min(
        paths, key=lambda path: (counts[path], snapshot.progress.get(path, 0.0), _rank(peer, path))
    )


def keeps(peer: str, what: str, *, peers: Sequence[str], num_keepers: int) -> bool:
    """Whether `peer` is among the `num_keepers` of `peers` that keep `what` (rendezvous hashing).

    `what` names a module or a shard, `peers` are those that do not train it. When peers come and
    go, few duties move.
    """
    ranked = sorted(peers, key=lambda other: _hash(f"{what}|{other}"))
    return peer in ranked[:num_keepers]


def module_name(module: ModuleID) -> str:
    """How a module is named to `keeps`."""
    return f"module {module}"


def shard_name(path: PathID) -> str:
    """How a path's shard is named to `keeps`."""
    return f"shard {path}"


def _capacities(snapshot: Snapshot, paths: Sequence[PathID]) -> dict[PathID, int]:
    """How many of the announced peers each path should have."""
    each, extra = divmod(len(snapshot.training), len(paths))
    counts = Counter(snapshot.training.values())
    bonus = HYSTERESIS * max(snapshot.progress.values(), default=0.0)

    def neglect(path: PathID) -> tuple[float, int]:
        stay = bonus if counts[path] > each else 0.0  # the seat in question is taken already
        return (snapshot.progress.get(path, 0.0) - stay, _hash(str(path)))

    capacities = dict.fromkeys(paths, each)
    for path in sorted(paths, key=neglect)[:extra]:
        capacities[path] += 1
    return capacities


def _rank(peer: str, path: PathID) -> int:
    return _hash(f"{peer}|{path}")


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
