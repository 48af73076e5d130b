"""Pulling certificates: checked as they come, and kept when a pull is cut short.

Those of a long run are tens of megabytes for each module, which takes a slow line minutes. So a
pull goes on for as long as it brings something, and the next one, from any holder of the same
history, begins where the last one ended. Nothing is kept that was not checked back to the manifest.
"""

import asyncio
import math
from collections import Counter
from collections.abc import Sequence
from itertools import takewhile

from dht.errors import BadMessage
from dipaco.topology import ModuleID
from peer.archive import Link, whole
from peer.certificate import check_chain
from peer.chain_server import CHAIN_PROTOCOL
from peer.messages import MAX_MESSAGE_BYTES, Certificate, ChainReply, ChainRequest
from peer.node import Node

STALL_SECONDS = 30.0  # without another certificate, before a pull is given up
MAX_REQUESTS = 4  # at a time, of all modules: on a slow line more would only make each one late
MAX_KEPT_PER_MODULE = 3  # histories, so that a liar's does not take the place of the true one
MAX_KEPT_BYTES = 2**28  # of all modules


class Checked:
    """Certificates that follow `parent` (None: the module's origin), oldest first, all checked."""

    def __init__(self, parent: Certificate | None) -> None:
        self.parent = parent
        self.newest = parent
        self.num_bytes = 0
        self._raw: list[bytes] = []  # a fourth of what they take as objects

    def __len__(self) -> int:
        return len(self._raw)

    def extend(self, certificates: Sequence[Certificate]) -> None:
        """Take in what continues this."""
        for certificate in certificates:
            self._raw.append(certificate.to_bytes())
            self.num_bytes += len(self._raw[-1])
            self.newest = certificate

    def certificates(self) -> list[Certificate]:
        """All of them again."""
        return [Certificate.from_bytes(raw, sender="here") for raw in self._raw]


class Chains:
    """Pulls the certificates of modules, and keeps what cut-off pulls have brought."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._requests = asyncio.Semaphore(MAX_REQUESTS)
        self._kept: list[tuple[ModuleID, Checked]] = []  # the one that grew last at the end
        self.num_checked: Counter[ModuleID] = Counter()  # certificates so far: whether one came

    async def pull(
        self,
        module: ModuleID,
        peer: str,
        ours: Sequence[Link],
        *,
        turn_seconds: float = math.inf,
    ) -> Checked | None:
        """The history that `peer` shows, from where it leaves `ours`; None if it shows nothing.

        Raises `Unreachable` when nothing more comes, and `PeerFault`. What has come by then is kept
        for the next call; so it is when `turn_seconds` are over, after which this is None, too.
        """
        begin_time = self._node.now()
        checked, theirs = await self._begin(module, peer, ours)
        while theirs:
            checked = await self._check(module, peer, checked, theirs, ours)
            if self._node.now() - begin_time > turn_seconds:
                return None
            theirs = await self._ask(module, peer, self._next_version(module, checked))
        return checked if len(checked) else None

    def forget(self, module: ModuleID, checked: Checked | None = None) -> None:
        """Keep this history of the module no longer; without one, none of them."""
        self._kept = [
            (other, kept)
            for other, kept in self._kept
            if other != module or (checked is not None and kept is not checked)
        ]

    def newest_version(self, module: ModuleID) -> int:
        """Up to which version certificates of the module are kept; 0 if none are."""
        kept = [checked.newest for other, checked in self._kept if other == module]
        return max((newest.version for newest in kept if newest is not None), default=0)

    async def _begin(
        self, module: ModuleID, peer: str, ours: Sequence[Link]
    ) -> tuple[Checked, list[Certificate]]:
        """What `peer`'s history has in common with one that is known here, and what comes next."""
        known = [*self._usable(module, ours), *([Checked(whole(ours[-1]))] if ours else [])]
        theirs: list[Certificate] = []
        for checked in known:
            assert checked.newest is not None, "neither is empty"
            theirs = await self._ask(module, peer, checked.newest.version)
            if theirs and theirs[0].digest == checked.newest.digest:
                return checked, theirs[1:]
        start = Checked(None)
        if ours and not theirs:
            return start, []  # it is not as far as this peer
        return start, await self._ask(module, peer, self._next_version(module, start))

    def _usable(self, module: ModuleID, ours: Sequence[Link]) -> list[Checked]:
        """What is kept of the module and later than `ours`, what grew last first."""
        first_version = self._node.history.origin(module).version + 1
        held_version = ours[-1].version if ours else 0
        for checked in [checked for other, checked in self._kept if other == module]:
            newest, parent = checked.newest, checked.parent
            is_linked = parent is None or (
                parent.version <= held_version
                and ours[parent.version - first_version].digest == parent.digest
            )
            is_later = newest is not None and newest.version > held_version
            if not (is_linked and is_later):
                self.forget(module, checked)
        return [checked for other, checked in reversed(self._kept) if other == module]

    async def _check(
        self,
        module: ModuleID,
        peer: str,
        checked: Checked,
        theirs: list[Certificate],
        ours: Sequence[Link],
    ) -> Checked:
        """Take in what comes next of a history; what of it is in `ours` was checked long ago."""
        node = self._node
        origin, slot = node.history.origin(module), node.slot
        if not len(checked):
            known = ours[theirs[0].version - origin.version - 1 :]
            pairs = zip(known, theirs, strict=False)
            same = list(takewhile(lambda pair: pair[0].digest == pair[1].digest, pairs))
            if same:
                checked, theirs = Checked(same[-1][1]), theirs[len(same) :]

        def check() -> None:
            check_chain(theirs, checked.newest, origin=origin, slot=slot, sender=peer)
            for certificate in theirs:
                if certificate.proposal.run != node.run or certificate.module != str(module):
                    raise BadMessage(peer, "certificates of another run or module")

        if theirs:
            await node.offload(check)
            checked.extend(theirs)
            self.num_checked[module] += len(theirs)
            self._keep(module, checked)
        return checked

    def _keep(self, module: ModuleID, checked: Checked) -> None:
        self.forget(module, checked)
        self._kept.append((module, checked))
        same = [kept for other, kept in self._kept if other == module]
        for oldest in same[:-MAX_KEPT_PER_MODULE]:
            self.forget(module, oldest)
        while sum(kept.num_bytes for _, kept in self._kept) > MAX_KEPT_BYTES:
            del self._kept[0]

    def _next_version(self, module: ModuleID, checked: Checked) -> int:
        newest = checked.newest
        return 1 + (self._node.history.origin(module).version if newest is None else newest.version)

    async def _ask(self, module: ModuleID, peer: str, first_version: int) -> list[Certificate]:
        """A message's worth of `peer`'s certificates, from `first_version` on."""
        node = self._node
        request = ChainRequest(run=node.run, module=str(module), first_version=first_version)
        async with self._requests:
            raw = await node.transport.request(
                peer,
                CHAIN_PROTOCOL,
                request.to_bytes(),
                timeout_seconds=STALL_SECONDS,
                max_response_bytes=MAX_MESSAGE_BYTES,
            )
        theirs = list(ChainReply.from_bytes(raw, sender=peer).certificates)
        if [c.version for c in theirs] != [first_version + n for n in range(len(theirs))]:
            raise BadMessage(peer, "certificates out of order")
        rounds = max(m.run_config.rounds.num_rounds for m in node.history.versions)
        if theirs and theirs[-1].version > node.history.origin(module).version + rounds:
            raise BadMessage(peer, "more certificates than the run has rounds")
        return theirs
