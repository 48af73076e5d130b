"""Crowded rounds: when more contribute than a version counts, the peers of a path average first.

Everyone pulls every contribution, so their number is bounded. Of more commitments than that, some
that belong to one path are averaged by one of their signers, who commits to the result in place of
all of them. If that peer is silent, what it should have merged waits for the next round, as far as
there is no room for it.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterable
from fractions import Fraction

from dipaco.compression import encode
from dipaco.outer import average
from peer.boundary import guarded
from peer.certificate import contribution_order
from peer.committer import Committer
from peer.member import Member
from peer.messages import MAX_COUNTED, MAX_TOKENS, Commitment
from peer.modules import Held
from peer.node import Node
from peer.reduction import merged_format

Group = tuple[Commitment, ...]


def groups_to_merge(commitments: Iterable[Commitment], *, limit: int) -> list[Group]:
    """Which commitments of one round to merge so that `limit` contributions are left of all.

    No group has more than it needs, and those of a path differ by one member at most. The first of
    each merges it; a hash that nobody chooses makes the order. Of more paths than `limit`, each has
    one contribution left. Empty if there are no more commitments than that.
    """
    by_path: dict[str, list[Commitment]] = defaultdict(list)
    in_turn = sorted(commitments, key=_turn)
    if len(in_turn) <= limit:
        return []
    for commitment in in_turn:
        by_path[commitment.path].append(commitment)
    num_left = dict.fromkeys(by_path, 1)
    while sum(num_left.values()) < limit:
        fullest = max(num_left, key=lambda path: (len(by_path[path]) / num_left[path], path))
        num_left[fullest] += 1
    groups = [
        tuple(on_path[number :: num_left[path]])
        for path, on_path in by_path.items()
        for number in range(num_left[path])
    ]
    return [group for group in groups if len(group) > 1]


def countable(group: Iterable[Commitment], *, max_tokens: int) -> list[Commitment]:
    """Those of a group that have no more tokens together than a commitment may name.

    The first, which merges, and the smallest others: who claims too many is left out by itself.
    """
    own, *others = group
    chosen, tokens = [own], own.tokens
    for other in sorted(others, key=lambda commitment: commitment.tokens):
        tokens += other.tokens
        if tokens > max_tokens:
            break
        chosen.append(other)
    return sorted(chosen, key=contribution_order)


def _turn(commitment: Commitment) -> bytes:
    name = f"merge|{commitment.module}|{commitment.slot}|{commitment.peer}"
    return hashlib.sha256(name.encode()).digest()


class Merging:
    """Merges what falls to this peer, and waits for what falls to others."""

    def __init__(self, node: Node, member: Member, committer: Committer) -> None:
        self._node = node
        self._member = member
        self._committer = committer

    async def attend(self, held: Held, slot: int, *, until: float) -> None:
        """When all have committed: return as soon as everything is merged, or at `until`."""
        contributions = self._member.contributions
        usable = contributions.usable(contributions.known(held.module, slot), held, slot)
        singles = [commitment for commitment in usable if not commitment.merged]
        groups = groups_to_merge(singles, limit=MAX_COUNTED)
        if not groups:
            return
        mine = next((group for group in groups if group[0].peer == self._node.peer_id), None)
        if mine is not None:
            # Whoever merges may have to lead the round, whatever comes of the merging.
            where = f"merging of {held.module}"
            await guarded(self._merge(held, mine, until), where, self._node.events)
        leads = {group[0].peer for group in groups}

        def is_merged() -> bool:
            known = contributions.known(held.module, slot)
            return leads <= {commitment.peer for commitment in known if commitment.merged}

        await self._member.changes.until(is_merged, max(0.0, until - self._node.now()))

    async def _merge(self, held: Held, group: Group, until: float) -> None:
        """Average what can be had of a group in time, and commit to that."""
        node, contributions = self._node, self._member.contributions
        await contributions.obtain(group, [], max(0.0, until - node.now()))
        there = contributions.held(group)
        if group[0] not in there:
            return
        there = countable(there, max_tokens=MAX_TOKENS)
        if len(there) < 2:
            return
        outer = node.history.at(group[0].slot).run_config.outer
        tokens = sum(commitment.tokens for commitment in there)
        weighted = [
            (float(Fraction(commitment.tokens, tokens)), contributions.gradient(commitment))
            for commitment in there
        ]
        raw = await node.offload(
            lambda: encode(
                average(weighted, clip_norm=outer.clip_norm), merged_format(outer.wire_format)
            )
        )
        commitment = await self._committer.prepare_merged(there, raw)
        node.events.write(
            "merged",
            module=str(held.module),
            slot=commitment.slot,
            path=commitment.path,
            parts=[part.peer for part in commitment.merged],
        )
        await self._committer.commit([commitment])
