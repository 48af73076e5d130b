"""A trainer's part of a round: put its outer gradients into the store, and commit to them."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from dht.errors import LocalFault
from dipaco.compression import EncodedGradient
from dipaco.topology import ModuleID, PathID
from peer.courier import MESSAGE_TIMEOUT_SECONDS, Kind
from peer.draft import Offer
from peer.heads import Heads
from peer.member import Member
from peer.messages import Commitment, CommitRequest, Done, Part, sign
from peer.node import Node

_SAME_IN_ALL_PARTS = {"manifest", "module", "slot", "base_version", "base_state", "path"}


class Committer:
    """Commits to outer gradients; the peers that hold their modules then pull them."""

    def __init__(self, node: Node, member: Member, heads: Heads) -> None:
        self._node = node
        self._member = member
        self._heads = heads
        self._slot_seconds = node.history.first.run_config.rounds.round_seconds

    async def prepare(
        self, offers: Sequence[Offer], *, path: PathID, slot: int
    ) -> list[Commitment]:
        """Put our outer gradients into the store, and sign a commitment to each.

        To each that the disk takes: what was trained is in the next slot's, too.
        """
        node = self._node
        commitments = []
        for offer in offers:
            try:
                commitment, gradient = await node.offload(
                    partial(self._keep, offer, path=path, slot=slot)
                )
            except (LocalFault, OSError) as error:
                node.events.write("error", where="contribution", why=str(error))
                continue
            commitments.append(commitment)
            node.events.write(
                "committed",
                module=commitment.module,
                slot=slot,
                base_version=offer.base_version,
                path=commitment.path,
                commitment=commitments[-1].digest,
            )
            self._member.contributions.add_own(commitment, gradient)
        return commitments

    async def prepare_merged(self, parts: Sequence[Commitment], raw: bytes) -> Commitment:
        """Put the average of `parts`, our own among them, into the store, and sign for it."""
        commitment, gradient = await self._node.offload(
            lambda: self._signed(
                raw,
                **parts[0].model_dump(include=_SAME_IN_ALL_PARTS),
                tokens=sum(part.tokens for part in parts),
                merged=tuple(Part(peer=part.peer, blob=part.blob) for part in parts),
            )
        )
        self._member.contributions.add_own(commitment, gradient)
        return commitment

    def _keep(self, offer: Offer, *, path: PathID, slot: int) -> tuple[Commitment, EncodedGradient]:
        return self._signed(
            offer.raw,
            manifest=self._node.history.at(slot).digest,
            module=str(offer.module),
            slot=slot,
            base_version=offer.base_version,
            base_state=offer.base_state,
            path=str(path),
            tokens=offer.tokens,
        )

    def _signed(self, raw: bytes, **fields: Any) -> tuple[Commitment, EncodedGradient]:
        """Our commitment to these bytes, which are in the store then."""
        node = self._node
        commitment = Commitment(
            peer=node.peer_id,
            run=node.run,
            blob=node.store.add(raw),
            blob_bytes=len(raw),
            **fields,
        )
        commitment = sign(commitment, node.identity)
        return commitment, self._member.contributions.open(commitment)

    async def commit(self, commitments: Sequence[Commitment]) -> None:
        """Send our commitments to every peer that holds one of their modules, one message each."""
        by_peer: dict[str, list[Commitment]] = {}
        for commitment in commitments:
            module = ModuleID.parse(commitment.module)
            certificate = self._node.log.held[module].certificate
            seats = certificate.proposal.next_roster if certificate else ()
            heads = await self._heads.read(module, max_age_seconds=self._slot_seconds)
            for peer in {seat.peer for seat in seats} | {head.peer for head in heads}:
                by_peer.setdefault(peer, []).append(commitment)
        by_peer.pop(self._node.peer_id, None)
        requests = {peer: CommitRequest(commitments=tuple(c)) for peer, c in by_peer.items()}
        await self._member.courier.ask_all(Done, requests, Kind.COMMIT, MESSAGE_TIMEOUT_SECONDS)
