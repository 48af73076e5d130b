"""Who trains which path, and who keeps which module: pure functions of a snapshot of the swarm.

Nobody assigns. Every peer computes the same assignment from (nearly) the same announcements, takes
its own line of it, and computes again at the next round; what two peers saw differently settles
then. Ties are broken by a hash of peer and path, so that joiners at the same instant spread out.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from heapq import heapify, heapreplace
from math import copysign
from statistics import fmean

from dipaco.topology import ModuleID, PathID

# A peer leaves a path for a neglected one only if its next slot's tokens are missing there by this
# many slots more than here: without a margin, peers would swap paths every round.
MARGIN_SLOTS = 0.25
# With peers enough for all paths, moving gains little and costs downloads: what a path is ahead or
# behind by less than this many slots is left as it is.
SLACK_SLOTS = 2.0
# A peer slower than this share of another one changes places with it where that helps.
SLOWER_SHARE = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """What a peer knows of the swarm when it chooses a path for the next slot.

    `training`: path of every announced peer. `shard_tokens`: size of every path's shard.
    `tokens`: trained on each path's shard by the end of this slot, as far as can be told.
    `slot_tokens`: what a peer trains in a slot; the mean stands for who has not said it. A peer
    with `room_bytes` takes only paths that `need_bytes` fit into. A path that is `finished` has all
    its rounds behind it, and needs nobody.
    """

    training: Mapping[str, PathID]
    shard_tokens: Mapping[PathID, int]
    tokens: Mapping[PathID, int] = field(default_factory=dict)
    slot_tokens: Mapping[str, int] = field(default_factory=dict)
    room_bytes: Mapping[str, int] = field(default_factory=dict)
    need_bytes: Mapping[PathID, int] = field(default_factory=dict)
    finished: frozenset[PathID] = frozenset()

    @property
    def open_paths(self) -> list[PathID]:
        """The paths that have rounds before them; all of them when none has."""
        return [p for p in self.shard_tokens if p not in self.finished] or [*self.shard_tokens]

    def fits(self, peer: str, path: PathID) -> bool:
        """Whether `peer` has the memory for `path`."""
        room = self.room_bytes.get(peer)
        return room is None or self.need_bytes.get(path, 0) <= room

    def speed(self, peer: str) -> float:
        """Tokens that `peer` trains in a slot, or probably does."""
        known = self.slot_tokens.get(peer, 0)
        return float(known) if known > 0 else self.mean_speed

    @property
    def mean_speed(self) -> float:
        """Tokens that a peer trains in a slot; 1 as long as nobody has said it."""
        known = [t for peer, t in self.slot_tokens.items() if t > 0 and peer in self.training]
        return fmean(known) if known else 1.0


def with_slot_under_way(snapshot: Snapshot) -> Snapshot:
    """A snapshot of what was trained before this slot, with what is trained in it added."""
    tokens = Counter(snapshot.tokens)
    for peer, path in snapshot.training.items():
        tokens[path] += round(snapshot.speed(peer))
    return replace(snapshot, tokens=tokens)


def assign_paths(snapshot: Snapshot) -> dict[str, PathID]:
    """The path of every announced peer in the next slot; one whom no path fits is left out.

    Tokens go to the paths in proportion to their shards, as far as whole slots allow, and no path
    is left out while there are peers enough. Who may stay stays; the fastest of the others goes
    where most is missing.
    """
    room = _seats(snapshot)
    assignment: dict[str, PathID] = {}
    homeless: list[str] = []
    for peer in sorted(snapshot.training, key=lambda p: (-snapshot.speed(p), _hash(p))):
        path = snapshot.training[peer]
        if room.get(path, 0) > 0 and snapshot.fits(peer, path):
            room[path] -= 1
            assignment[peer] = path
        else:
            homeless.append(peer)
    for peer in sorted(homeless, key=lambda p: sum(snapshot.fits(p, path) for path in room)):
        possible = [path for path in room if snapshot.fits(peer, path)]
        if not possible:
            continue
        path = min(
            possible,
            key=lambda path: (room[path] <= 0, _epochs(snapshot, path), _rank(peer, path)),
        )
        room[path] -= 1
        assignment[peer] = path
    _exchange_slow(assignment, snapshot)
    return assignment


def joining_order(peer: str, snapshot: Snapshot) -> list[PathID]:
    """The paths that fit `peer`, which trains none yet, the one that it should take first.

    Those without a peer first, then those with the fewest epochs, then by hash; those that are
    finished last.
    """
    counts = Counter(path for other, path in snapshot.training.items() if other != peer)

    def urgency(path: PathID) -> tuple[bool, bool, float, int]:
        tokens = snapshot.tokens.get(path, 0) + (counts[path] + 0.5) * snapshot.mean_speed
        epochs = tokens / _shard(snapshot, path)
        return path in snapshot.finished, counts[path] > 0, epochs, _rank(peer, path)

    return sorted(
        (path for path in snapshot.shard_tokens if snapshot.fits(peer, path)), key=urgency
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


def _seats(snapshot: Snapshot) -> dict[PathID, int]:
    """How many of the announced peers each path should have in the next slot.

    One seat after another goes to the path that would have the fewest epochs in the middle of it:
    so after any number of slots a path is about half a slot from its share (Sainte-Laguë). No path
    gets more seats at a time than its share of the peers, rounded up.
    """
    paths = snapshot.open_paths
    num_peers, num_paths = len(snapshot.training), len(paths)
    counts = Counter(p for peer, p in snapshot.training.items() if snapshot.fits(peer, p))
    shards = sum(_shard(snapshot, path) for path in paths)
    trained = sum(snapshot.tokens.get(path, 0) for path in paths)
    speed = snapshot.mean_speed
    slack = SLACK_SLOTS * speed if num_peers >= num_paths else 0.0

    def urgency(path: PathID, seat: int) -> tuple[int, float, int]:
        """What comes first is seated first: in three groups, each by epochs."""
        shard = _shard(snapshot, path)
        is_first = seat == 0 and num_peers >= num_paths
        is_over_share = seat * shards >= num_peers * shard
        ahead = snapshot.tokens.get(path, 0) - trained * shard / shards
        counted = copysign(max(0.0, abs(ahead) - slack), ahead)
        slots = seat + 0.5 - (MARGIN_SLOTS if seat < counts[path] else 0.0)
        group = 0 if is_first else 2 if is_over_share else 1
        return group, (counted + slots * speed) / shard, _hash(str(path))

    seats = dict.fromkeys(paths, 0)
    queue = [(urgency(path, 0), path) for path in seats]
    heapify(queue)
    for _ in snapshot.training:
        _, path = queue[0]
        seats[path] += 1
        heapreplace(queue, (urgency(path, seats[path]), path))
    return seats


def _exchange_slow(assignment: dict[str, PathID], snapshot: Snapshot) -> None:
    """Where a slow peer keeps its path behind, let it change places with a fast one ahead."""
    tokens = dict.fromkeys(assignment.values(), 0.0)
    for peer, path in assignment.items():
        tokens[path] += snapshot.speed(peer)

    def epochs(path: PathID) -> float:
        return _epochs(snapshot, path) + tokens[path] / _shard(snapshot, path)

    for _ in range(len(assignment)):
        behind, ahead = min(tokens, key=epochs), max(tokens, key=epochs)
        slow = min((p for p in assignment if assignment[p] == behind), key=snapshot.speed)
        fast = max((p for p in assignment if assignment[p] == ahead), key=snapshot.speed)
        more = snapshot.speed(fast) - snapshot.speed(slow)
        gain = more / _shard(snapshot, behind) + more / _shard(snapshot, ahead)
        if (
            snapshot.speed(slow) >= SLOWER_SHARE * snapshot.speed(fast)
            or epochs(ahead) - epochs(behind) < gain
            or not (snapshot.fits(fast, behind) and snapshot.fits(slow, ahead))
        ):
            return
        assignment[slow], assignment[fast] = ahead, behind
        tokens[behind] += more
        tokens[ahead] -= more


def _epochs(snapshot: Snapshot, path: PathID) -> float:
    return snapshot.tokens.get(path, 0) / _shard(snapshot, path)


def _shard(snapshot: Snapshot, path: PathID) -> int:
    return max(1, snapshot.shard_tokens[path])


def _rank(peer: str, path: PathID) -> int:
    return _hash(f"{peer}|{path}")


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
