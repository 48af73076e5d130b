"""Getting a module from others: its certificates, checked back to the manifest, then its state.

Who is a few versions behind gets the contributions that it missed, and reduces them as in a round;
everybody else gets one whole state. Either has the digest that the newest certificate names.

Head records say who claims which version; they are rumours, so the best claim is tried first and
believed only as far as its certificates reach. Two histories that differ resolve by the fixed rule
at the first version where they do.
"""

import asyncio
from collections.abc import Sequence
from typing import Any

from dht.errors import BadMessage, PeerFault, SwarmError, Unreachable
from dht.records import Head
from dipaco.checkpoint import decode_state, state_bytes
from dipaco.errors import BadState
from dipaco.topology import ModuleID
from peer.certificate import check_chain, facts, wins
from peer.contributions import SLOTS_KEPT
from peer.heads import Heads
from peer.member import CHAIN_PROTOCOL, Member
from peer.messages import MAX_MESSAGE_BYTES, Certificate, ChainReply, ChainRequest
from peer.modules import Held
from peer.node import Node
from peer.providers import Providers
from peer.transport import deadline

MAX_HOLDERS_TRIED = 4
MAX_DISPROVEN = 1024  # claims remembered that led nowhere
MAX_VERSIONS_REPLAYED = 3  # more are as a rule forgotten by those who had the contributions
CHAIN_TIMEOUT_SECONDS = 15.0  # for a message's worth of certificates
HISTORY_TIMEOUT_SECONDS = 120.0  # for all of them


class CatchUp:
    """Brings held modules up to what the swarm has certified."""

    def __init__(self, node: Node, member: Member, heads: Heads, providers: Providers) -> None:
        self._node = node
        self._member = member
        self._heads = heads
        self._providers = providers
        self._locks: dict[ModuleID, asyncio.Lock] = {}
        self._disproven: dict[tuple[ModuleID, str], None] = {}  # whose last claim led nowhere

    async def open(self, module: ModuleID) -> bool:
        """Hold `module` at the newest certified version that can be had; False if none can."""
        node = self._node
        async with self._lock(module):
            if module not in node.log.held:
                resumed = await node.offload(lambda: node.log.open(module))
                if resumed is not None:
                    node.events.write("resumed", **_resumed_facts(resumed))
            await self._refresh(module)
            if module in node.log.held:
                return True
            try:
                await self._providers.obtain(node.history.origin(module).state)
            except SwarmError:
                return False
            node.log.adopt(module, [])
            return True

    async def refresh(self, module: ModuleID) -> bool:
        """Move to a newer certified version if some holder has one; True if that was so."""
        async with self._lock(module):
            return await self._refresh(module)

    def _lock(self, module: ModuleID) -> asyncio.Lock:
        """One at a time: who is late must not put an older version in a newer one's place."""
        return self._locks.setdefault(module, asyncio.Lock())

    async def _refresh(self, module: ModuleID) -> bool:
        heads = await self._heads.read(module, max_age_seconds=0.0)
        held = self._node.log.held.get(module)
        origin = self._node.history.origin(module)
        version = held.version if held is not None else origin.version
        ours = held.certificate.digest if held is not None and held.certificate else ""
        claims = [
            head
            for head in sorted(heads, key=lambda head: self._rank(module, head))
            if head.peer != self._node.peer_id
            and (head.version > version or (head.version == version and head.certificate != ours))
            and head.version > origin.version
        ]
        for head in claims[:MAX_HOLDERS_TRIED]:
            try:
                if await self._follow(module, head, claims):
                    self._disproven.pop((module, head.peer), None)
                    return True
                self._disproven[module, head.peer] = None
            except (PeerFault, Unreachable) as error:
                self._disproven[module, head.peer] = None
                self._node.faults.count(error, head.peer)
        while len(self._disproven) > MAX_DISPROVEN:
            del self._disproven[next(iter(self._disproven))]
        return False

    def _rank(self, module: ModuleID, head: Head) -> tuple[bool, int]:
        """The best claim first, after all of those whose last one led nowhere."""
        return (module, head.peer) in self._disproven, -head.version

    async def _follow(self, module: ModuleID, head: Head, heads: Sequence[Head]) -> bool:
        """Take up the history that `head`'s peer shows, if it is one and better than ours."""
        node = self._node
        held = node.log.held.get(module)
        origin = node.history.origin(module)
        chain = list(held.chain) if held is not None else []
        newest = chain[-1].version if chain else origin.version + 1
        theirs = await self._chain(module, head.peer, first_version=newest)
        if chain and theirs and theirs[0].digest != chain[-1].digest:
            theirs = await self._chain(module, head.peer, first_version=origin.version + 1)
            chain = _common(chain, theirs)
            theirs = theirs[len(chain) :]
        elif chain and theirs:
            theirs = theirs[1:]
        if theirs and held is not None and theirs[-1].version < held.version:
            return False  # versions only grow (promise P2)
        if not theirs or not self._is_better(module, chain, theirs):
            return False
        parent, slot = chain[-1] if chain else None, node.slot
        await node.offload(
            lambda: check_chain(theirs, parent, origin=origin, slot=slot, sender=head.peer)
        )
        if any(certificate.proposal.run != node.run or certificate.module != str(module)
               for certificate in theirs):  # fmt: skip
            raise BadMessage(head.peer, "certificates of another run or module")
        if (
            held is not None
            and len(chain) == len(held.chain)  # it only goes on where ours ends
            and self._is_replay_cheaper(module, theirs)
            and await self._replay(module, theirs, head.peer)
        ):
            return True
        await self._fetch_state(module, theirs[-1], heads)
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
        self, module: ModuleID, common: list[Certificate], theirs: list[Certificate]
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

    async def _chain(self, module: ModuleID, peer: str, *, first_version: int) -> list[Certificate]:
        """Certificates from `first_version` on; as many requests as it takes within the time."""
        limit = self._node.history.newest.run_config.rounds.num_rounds
        chain: list[Certificate] = []
        async with deadline(peer, HISTORY_TIMEOUT_SECONDS):
            while len(chain) <= limit:
                request = ChainRequest(
                    run=self._node.run, module=str(module), first_version=first_version + len(chain)
                )
                raw = await self._node.transport.request(
                    peer,
                    CHAIN_PROTOCOL,
                    request.to_bytes(),
                    timeout_seconds=CHAIN_TIMEOUT_SECONDS,
                    max_response_bytes=MAX_MESSAGE_BYTES,
                )
                reply = ChainReply.from_bytes(raw, sender=peer)
                if not reply.certificates:
                    return chain
                for certificate in reply.certificates:
                    if certificate.version != first_version + len(chain):
                        raise BadMessage(peer, "certificates out of order")
                    chain.append(certificate)
        raise BadMessage(peer, "more certificates than the run has rounds")

    async def _fetch_state(
        self, module: ModuleID, certificate: Certificate, heads: Sequence[Head]
    ) -> None:
        node = self._node
        num_parameters = node.log.num_parameters(module)
        size = state_bytes(num_parameters)
        holders = [head.peer for head in heads if head.state == certificate.result]
        voters = [vote.peer for vote in certificate.votes]
        was_here = certificate.result in node.store  # whatever it is
        await node.blobs.fetch(certificate.result, [*holders, *voters], max_bytes=size)
        try:
            raw = node.store.read(certificate.result)
            await node.offload(lambda: decode_state(raw or b"", num_parameters=num_parameters))
        except BadState as error:
            if not was_here:
                node.store.remove(certificate.result)
            raise Unreachable(
                f"module {module}: a quorum certified a state that is none"
            ) from error


def _resumed_facts(held: Held) -> dict[str, Any]:
    if held.certificate is not None:
        return facts(held.certificate)
    return {"module": str(held.module), "version": held.version, "state": held.state}


def _common(ours: list[Certificate], theirs: list[Certificate]) -> list[Certificate]:
    """The shared beginning of two histories."""
    common: list[Certificate] = []
    for mine, other in zip(ours, theirs, strict=False):
        if mine.digest != other.digest:
            break
        common.append(mine)
    return common
