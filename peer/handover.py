"""AdamW's state of a path, from the peer that trained it last to the one that trains it now.

Who takes a path asks those who trained it of late, by the announcements and by the contributions
that the path's certificates count. The answer names a blob, made of what lies on that peer's disk,
and pulled like any other. Training begins meanwhile with an optimizer that warms up; if the blob
comes in time the optimizer goes on from there, and if it does not, nothing was lost.

No certificate covers this state, since everyone's steps are their own business. What arrives is
checked (`dipaco.moments`), and can spoil some of the asker's own steps at worst. Of those the swarm
takes what it takes of anyone's: an outer gradient that is clipped.
"""

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping
from pathlib import Path

from dht.errors import BadMessage, LocalFault, SwarmError
from dipaco.config import InnerConfig
from dipaco.errors import BadBytes
from dipaco.moments import Moments, decode_moments, encode_moments, moments_bytes
from dipaco.optimizer import saved_moments
from dipaco.topology import PathID
from peer.archive import shares
from peer.messages import HandoverReply, HandoverRequest
from peer.modules import Held
from peer.node import Node
from peer.path_files import OPTIMIZER_SUFFIX, PATHS_KEPT

HANDOVER_PROTOCOL = "/dipaco/handover/1"
MAX_REQUEST_BYTES = 256
MAX_REPLY_BYTES = 256
MAX_PEERS_ASKED = 3
REQUEST_SECONDS = 15.0  # a peer packs one state at a time, and reads it from its disk
TIME_SHARE = 0.5  # of a slot, for all of it: after that, the own optimizer is as good
CURRENT_SLOTS = 2  # an own state that is younger is as good as anyone's


class Handover:
    """Gives and takes the optimizers' states of paths; those it gives lie in `directory`."""

    def __init__(self, node: Node, directory: Path) -> None:
        self._node = node
        self._directory = directory
        self._turn = asyncio.Lock()  # packing takes memory: one at a time
        self._packed: dict[str, tuple[int, str]] = {}  # by path: of which file, and as which blob

    async def serve(self) -> None:
        """Start answering."""
        await self._node.transport.serve(
            HANDOVER_PROTOCOL, self._answer, max_request_bytes=MAX_REQUEST_BYTES
        )

    async def take(
        self, path: PathID, peers: Iterable[str], *, num_parameters: int, config: InnerConfig
    ) -> Moments | None:
        """The state that the first of `peers` to have one gives; None if there is none in time."""
        round_seconds = self._node.history.first.run_config.rounds.round_seconds
        try:
            async with asyncio.timeout(TIME_SHARE * round_seconds):
                for peer in list(peers)[:MAX_PEERS_ASKED]:
                    moments = await self._take_from(peer, path, num_parameters, config)
                    if moments is not None:
                        return moments
        except TimeoutError:
            pass
        return None

    async def _take_from(
        self, peer: str, path: PathID, num_parameters: int, config: InnerConfig
    ) -> Moments | None:
        node = self._node
        size = moments_bytes(num_parameters)
        try:
            raw = await node.transport.request(
                peer,
                HANDOVER_PROTOCOL,
                HandoverRequest(run=node.run, path=str(path)).to_bytes(),
                timeout_seconds=REQUEST_SECONDS,
                max_response_bytes=MAX_REPLY_BYTES,
            )
            blob = HandoverReply.from_bytes(raw, sender=peer).blob
            if blob is None:
                return None
            await node.blobs.fetch(blob, [peer], max_bytes=size)
            # Bad bytes are left to the sweep: the blob may be one that is here for a good reason.
            moments = await node.offload(
                lambda: decode_moments(
                    node.store.read(blob) or b"", num_parameters=num_parameters, config=config
                )
            )
        except BadBytes as error:
            node.faults.count(BadMessage(peer, str(error)), peer)
            return None
        except LocalFault as error:  # our disk: nothing that the peer could help
            node.events.write("error", where="handover", why=str(error))
            return None
        except SwarmError as error:
            node.faults.count(error, peer)
            return None
        node.events.write(
            "optimizer taken over", path=str(path), peer=peer, steps=moments.num_steps, blob=blob
        )
        return moments

    async def _answer(self, peer_id: str, payload: bytes) -> AsyncIterator[bytes]:
        request = HandoverRequest.from_bytes(payload, sender=peer_id, max_bytes=MAX_REQUEST_BYTES)
        if request.run != self._node.run:
            raise BadMessage(peer_id, "asks for a path of another run")
        async with self._turn:
            blob = await self._blob(request.path)
        yield HandoverReply(blob=blob).to_bytes()

    async def _blob(self, path: str) -> str | None:
        """The packed state of a path as a blob that is here; None if none was kept of it."""
        node, file = self._node, self._directory / f"{path}{OPTIMIZER_SUFFIX}"
        try:
            written = file.stat().st_mtime_ns
        except FileNotFoundError:
            return None
        known, blob = self._packed.get(path, (0, ""))
        if known == written and blob in node.store:
            return blob
        packed = await node.offload(lambda: _pack(file))
        if packed is None:
            return None
        blob = await node.offload(lambda: node.store.add(packed))
        self._packed[path] = written, blob
        while len(self._packed) > PATHS_KEPT:
            del self._packed[next(iter(self._packed))]
        return blob


def predecessors(
    path: PathID,
    modules: Iterable[Held],
    *,
    announced: Mapping[str, PathID],
    peer: str,
    slot: int,
    has_own: bool,
) -> list[str]:
    """Whom `peer`, which takes `path` in `slot`, should ask for its optimizer's state.

    Who was `announced` on the path lately, then those whose contributions `modules` count, the
    latest first; nobody if `peer` has a state of its own (`has_own`) that is about as late.
    """
    if slot <= 0:
        return []  # nobody has learnt anything yet
    slots = {other: slot for other, theirs in announced.items() if theirs == path}
    for held in modules:
        for certificate in held.chain:
            for share in shares(certificate):
                if share.path == str(path):
                    for contributor in share.peers:
                        slots[contributor] = max(slots.get(contributor, -1), share.slot)
    own = slots.pop(peer, -1) if has_own else -1
    slots.pop(peer, None)
    asked = [other for other in slots if own < 0 or slots[other] - own >= CURRENT_SLOTS]
    return sorted(asked, key=lambda other: (-slots[other], other))


def _pack(file: Path) -> bytes | None:
    moments = saved_moments(file)
    try:
        return None if moments is None else encode_moments(moments)
    except BadBytes:
        return None
