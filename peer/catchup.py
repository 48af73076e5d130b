"""Getting a module from others: its certificates, checked back to the manifest, then its state.

Who is a few versions behind gets the contributions that it missed, and reduces them as in a round;
everybody else gets one whole state. Either has the digest that the newest certificate names.

Head records say who claims which version; they are rumours, so the best claim is tried first and
believed only as far as its certificates reach. Two histories that differ resolve by the fixed rule
at the first version where they do. While somebody may well have a later version, a module is not
begun at its origin: what is trained from there would count for nothing.
"""

import asyncio
import math
from collections import Counter
from collections.abc import Sequence

from dht.errors import BadMessage, NotYet, Offline, PeerFault, Unreachable
from dht.records import Head
from dipaco.checkpoint import decode_state, state_bytes
from dipaco.errors import BadState
from dipaco.topology import ModuleID
from peer.archive import Link
from peer.certificate import facts, wins
from peer.chains import Chains
from peer.contributions import SLOTS_KEPT
from peer.heads import Heads
from peer.member import Member
from peer.messages import Certificate
from peer.node import Node
from peer.providers import Providers

MAX_HOLDERS_TRIED = 4  # in one look for later versions
MAX_FRUITLESS = 8  # looks in a row that bring nothing of a claim, before it is not waited for
MAX_CLAIMS_REMEMBERED = 8192  # that have not brought a module forward: all readers see of 32 keys
MAX_VERSIONS_REPLAYED = 3  # more are as a rule forgotten by those who had the contributions
TURN_SECONDS = 120.0  # of one holder's certificates, before another one's turn to go on with them


class CatchUp:
    """Brings held modules up to what the swarm has certified."""

    def __init__(self, node: Node, member: Member, heads: Heads, providers: Providers) -> None:
        self._node = node
        self._member = member
        self._heads = heads
        self._providers = providers
        self._chains = Chains(node)
        self._locks: dict[ModuleID, asyncio.Lock] = {}
        # Whose claims have not brought a module forward when they were tried, longest ago first,
        # and how often in a row nothing at all came of it.
        self._fruitless: dict[tuple[ModuleID, str], int] = {}
        self._parts_brought: Counter[ModuleID] = Counter()  # of states that did not come whole

    async def open(self, module: ModuleID) -> bool:
        """Hold `module` at the newest certified version that can be had; False if none can.

        Raises `NotYet` if only its origin can, though there is a later version elsewhere.
        """
        node = self._node
        async with self._lock(module):
            if module not in node.log.held:
                resumed = await node.offload(lambda: node.log.open(module))
                if resumed is not None and resumed.certificate is not None:
                    node.log.held[module] = resumed
                    node.events.write("resumed", **facts(resumed.certificate))
            claims = await self._claims(module)
            if await self._try(module, claims) or module in node.log.held:
                return True
            if elsewhere := [c.version for c in claims if self._is_credible(module, c)]:
                raise NotYet(
                    f"module {module} is at version {max(elsewhere)} elsewhere, "
                    "but nobody hands it out"
                )
            try:
                await self._providers.obtain(node.history.origin(module).state)
            except Unreachable:
                return False
            node.log.adopt(module, [])
            return True

    async def refresh(self, module: ModuleID) -> bool:
        """Move to a newer certified version if some holder has one; True if that was so."""
        async with self._lock(module):
            return await self._try(module, await self._claims(module))

    def _lock(self, module: ModuleID) -> asyncio.Lock:
        """One at a time: who is late must not put an older version in a newer one's place."""
        return self._locks.setdefault(module, asyncio.Lock())

    async def _claims(self, module: ModuleID) -> list[Head]:
        """The heads that claim more than is held here.

        The best first, after all whose last one led nowhere; of these that tried longest ago.
        """
        heads = await self._heads.read(module, max_age_seconds=0.0)
        held = self._node.log.held.get(module)
        origin = self._node.history.origin(module)
        version = held.version if held is not None else origin.version
        ours = held.certificate.digest if held is not None and held.certificate else ""
        places = {tried: place for place, tried in enumerate(self._fruitless)}
        return [
            head
            for head in sorted(
                heads, key=lambda head: (places.get((module, head.peer), -1), -head.version)
            )
            if head.peer != self._node.peer_id
            and (head.version > version or (head.version == version and head.certificate != ours))
            and head.version > origin.version
        ]

    async def _try(self, module: ModuleID, claims: Sequence[Head]) -> bool:
        """Follow some of these claims, until one of them brings the module forward."""
        node = self._node
        for head in claims[:MAX_HOLDERS_TRIED]:
            before, num_more = self._brought(module), 1
            try:
                if await self._follow(module, head, claims):
                    self._fruitless.pop((module, head.peer), None)
                    return True
                num_more = MAX_FRUITLESS  # it has answered, and shown nothing
            except (PeerFault, Unreachable) as error:
                if isinstance(error, BadMessage):
                    num_more = MAX_FRUITLESS
                elif isinstance(error, Offline):
                    num_more = 0  # it was not asked
                node.faults.count(error, head.peer)
            tries = self._fruitless.pop((module, head.peer), 0) + num_more
            has_brought = self._brought(module) != before
            self._fruitless[module, head.peer] = 0 if has_brought else tries
            if has_brought and (newest := self._chains.newest_version(module)):
                node.events.write(
                    "catch-up cut short", module=str(module), version=newest, of=head.version
                )
        while len(self._fruitless) > MAX_CLAIMS_REMEMBERED:
            del self._fruitless[next(iter(self._fruitless))]
        return False

    def _brought(self, module: ModuleID) -> int:
        """Grows with whatever a claim brings that the next attempt need not get again."""
        return self._chains.num_checked[module] + self._parts_brought[module]

    def _is_credible(self, module: ModuleID, head: Head) -> bool:
        """Whether what `head` claims can be, and has not been looked for in vain too often.

        Else a single peer could keep all newcomers waiting for a version that nobody has.
        """
        node = self._node
        if node.slot < 0:
            return False
        possible = node.slot + 2  # one version per slot, and the clocks differ
        return (
            head.version - node.history.origin(module).version <= possible
            and self._fruitless.get((module, head.peer), 0) < MAX_FRUITLESS
        )

    async def _follow(self, module: ModuleID, head: Head, claims: Sequence[Head]) -> bool:
        """Take up the history that `head`'s peer shows, if it is one and better than ours."""
        node = self._node
        held = node.log.held.get(module)
        ours = list(held.chain) if held is not None else []
        turn_seconds = TURN_SECONDS if len(claims) > 1 else math.inf
        checked = await self._chains.pull(module, head.peer, ours, turn_seconds=turn_seconds)
        if checked is None:
            return False
        theirs = await node.offload(checked.certificates)
        held, before = node.log.held.get(module), held
        if before is not None and held is None:
            return True  # it was given up meanwhile
        ours = list(held.chain) if held is not None else []
        chain, theirs = self._parted(module, ours, theirs)
        if theirs and held is not None and theirs[-1].version < held.version:
            return False  # versions only grow (promise P2)
        if not theirs or not self._is_better(module, chain, theirs):
            self._chains.forget(module, checked)
            return False
        if (
            held is not None
            and len(chain) == len(held.chain)  # it only goes on where ours ends
            and self._is_replay_cheaper(module, theirs)
            and await self._replay(module, theirs, head.peer)
        ):
            self._chains.forget(module)
            return True
        await self._fetch_state(module, theirs[-1], claims, shown_by=head.peer)
        self._chains.forget(module)
        if node.log.held.get(module) is not held:
            return True  # the round itself brought us forward meanwhile
        node.log.adopt(module, [*chain, *theirs])
        node.events.write("caught up", **facts(theirs[-1]), versions=len(theirs))
        self._member.caught_up(module, theirs[-1])
        return True

    def _is_replay_cheaper(self, module: ModuleID, missed: Sequence[Certificate]) -> bool:
        """Whether the contributions of `missed` are kept still, and fewer bytes than the state."""
        node = self._node
        commitments = {c.blob: c for m in missed for c in m.proposal.contributions}.values()
        num_bytes = sum(c.blob_bytes for c in commitments if c.blob not in node.store)
        return (
            len(missed) <= MAX_VERSIONS_REPLAYED
            and all(abs(node.slot - c.slot) <= SLOTS_KEPT for c in commitments)
            and num_bytes < state_bytes(node.log.num_parameters(module))
        )

    async def _replay(self, module: ModuleID, missed: Sequence[Certificate], peer: str) -> bool:
        """Take one missed version after another, as in a round; False if that fails on the way."""
        node = self._node
        for certificate in missed:
            if not await self._member.learn(certificate, sender=peer):
                return False
        node.events.write(
            "replayed", module=str(module), version=missed[-1].version, versions=len(missed)
        )
        return True

    def _is_better(
        self, module: ModuleID, common: Sequence[Link], theirs: Sequence[Certificate]
    ) -> bool:
        held = self._node.log.held.get(module)
        ours = held.chain[len(common) :] if held is not None else []
        if not ours:
            return True
        better = wins(theirs, ours)
        self._node.events.write(
            "fork",
            module=str(module),
            version=ours[0].version,
            lost=better,
            ours=ours[0].digest,
            theirs=theirs[0].digest,
        )
        return better

    def _parted(
        self, module: ModuleID, ours: Sequence[Link], theirs: Sequence[Certificate]
    ) -> tuple[list[Link], list[Certificate]]:
        """The shared beginning of two histories, and what follows it in `theirs`.

        `theirs` begins at the origin, or continues a certificate of `ours`.
        """
        begin = theirs[0].version - self._node.history.origin(module).version - 1
        same = 0
        for mine, other in zip(ours[begin:], theirs, strict=False):
            if mine.digest != other.digest:
                break
            same += 1
        return list(ours[: begin + same]), list(theirs[same:])

    async def _fetch_state(
        self, module: ModuleID, certificate: Certificate, heads: Sequence[Head], *, shown_by: str
    ) -> None:
        node = self._node
        num_parameters = node.log.num_parameters(module)
        size = state_bytes(num_parameters)
        # Of who showed the certificate: its head may have been read long before that.
        holders = [shown_by, *(head.peer for head in heads if head.state == certificate.result)]
        voters = [vote.peer for vote in certificate.votes]
        was_here = certificate.result in node.store  # whatever it is
        before = node.store.arrived_bytes(certificate.result)
        try:
            await node.blobs.fetch(certificate.result, [*holders, *voters], max_bytes=size)
        except Unreachable:
            self._parts_brought[module] += node.store.arrived_bytes(certificate.result) > before
            raise
        try:
            raw = node.store.read(certificate.result)
            await node.offload(lambda: decode_state(raw or b"", num_parameters=num_parameters))
        except BadState as error:
            if not was_here:
                node.store.remove(certificate.result)
            raise Unreachable(
                f"module {module}: a quorum certified a state that is none"
            ) from error
