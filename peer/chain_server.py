"""The certificates of a module, for whoever is behind, or asks for the first time."""

from collections.abc import AsyncIterator, Sequence

from dht.errors import BadMessage, PeerFault
from dipaco.topology import ModuleID
from peer.archive import Archived, Link, whole
from peer.messages import MAX_MESSAGE_BYTES, Certificate, ChainReply, ChainRequest
from peer.node import Node

CHAIN_PROTOCOL = "/dipaco/chain/1"

MAX_REQUEST_BYTES = 1024
MAX_CERTIFICATES = 256  # in a reply, as far as they fit


async def serve_chains(node: Node) -> None:
    """Answer with the certificates of the modules that are held here, from a version on."""

    async def answer(peer_id: str, payload: bytes) -> AsyncIterator[bytes]:
        try:
            reply = await _reply(node, ChainRequest.from_bytes(payload, sender=peer_id), peer_id)
        except PeerFault as error:
            node.faults.count(error, error.peer_id)
            raise
        yield reply.to_bytes()

    await node.transport.serve(CHAIN_PROTOCOL, answer, max_request_bytes=MAX_REQUEST_BYTES)


async def _reply(node: Node, request: ChainRequest, peer_id: str) -> ChainReply:
    module = ModuleID.parse(request.module)
    if request.run != node.run:
        raise BadMessage(peer_id, "a message of another run")
    if (held := node.log.held.get(module)) is None:
        raise ValueError(f"module {module} is not held here")
    after = held.after(request.first_version - 1)
    if after and isinstance(after[0], Archived):  # that is on the disk
        return await node.offload(lambda: _chain_reply(after))
    return _chain_reply(after)


def _chain_reply(links: Sequence[Link]) -> ChainReply:
    """As many of these certificates, oldest first, as one message holds."""
    fitting: list[Certificate] = []
    room = MAX_MESSAGE_BYTES - 1024
    for certificate in map(whole, links[:MAX_CERTIFICATES]):
        room -= len(certificate.to_bytes()) + 1
        if room < 0:
            break
        fitting.append(certificate)
    return ChainReply(certificates=tuple(fitting))
