"""What we ask of a running p2pd, over its control socket; `dht.daemon` is about the process.

Each request has a connection of its own.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from hivemind.p2p import PeerID
from hivemind.p2p.p2p_daemon_bindings.utils import read_pbmsg_safe, write_pbmsg
from hivemind.proto import p2pd_pb2
from hivemind.utils.multiaddr import Multiaddr

from dht.addresses import split_maddr
from dht.errors import Offline, Unreachable

if TYPE_CHECKING:
    from hivemind.p2p import P2P

CONTROL_BUFFER_BYTES = 2**20  # of a stream from p2pd


async def dial(p2p: P2P, maddr: str, *, timeout_seconds: float) -> str:
    """Connect p2pd to the peer at `maddr`, and return its peer ID. Raises `Unreachable`.

    From then on it, and whom it knows, can be reached by peer ID alone.
    """
    where, peer_id = split_maddr(maddr)
    connect = p2pd_pb2.ConnectRequest(
        peer=PeerID.from_base58(peer_id).to_bytes(), addrs=[Multiaddr(where).to_bytes()]
    )
    request = p2pd_pb2.Request(type=p2pd_pb2.Request.CONNECT, connect=connect)
    try:
        async with asyncio.timeout(timeout_seconds):
            _, _, writer = await ask_daemon(p2p, request)
    except (Unreachable, TimeoutError) as e:
        why = "no answer in time" if isinstance(e, TimeoutError) else str(e)
        raise Unreachable(
            f"cannot reach `{maddr}`: {why}",
            hint="check the address, and that the peer there is running and not behind a firewall",
        ) from e
    writer.close()
    return peer_id


async def identify(p2p: P2P) -> list[str]:
    """The addresses by which others may reach this p2pd now, without its peer ID.

    No timeout here; raises as `ask_daemon` does.
    """
    request = p2pd_pb2.Request(type=p2pd_pb2.Request.IDENTIFY)
    response, _, writer = await ask_daemon(p2p, request)
    writer.close()
    return [str(Multiaddr(raw)) for raw in response.identify.addrs]


async def list_peers(p2p: P2P) -> dict[str, list[str]]:
    """Whom p2pd is connected to: peer ID -> addresses `/ip4/…` they are seen at.

    No timeout here; raises as `ask_daemon` does.
    """
    request = p2pd_pb2.Request(type=p2pd_pb2.Request.LIST_PEERS)
    response, _, writer = await ask_daemon(p2p, request)
    writer.close()
    seen: dict[str, list[str]] = {}
    for peer in response.peers:
        maddrs = seen.setdefault(str(PeerID(peer.id)), [])
        maddrs += [str(Multiaddr(raw)) for raw in peer.addrs]
    return seen


async def ask_daemon(
    p2p: P2P, request: p2pd_pb2.Request, *, buffer_bytes: int = CONTROL_BUFFER_BYTES
) -> tuple[p2pd_pb2.Response, asyncio.StreamReader, asyncio.StreamWriter]:
    """Send p2pd a request on a connection of its own; (response, reader, writer) if it agrees.

    hivemind's own calls leave the connection open when p2pd refuses or the caller gives up.
    Raises `Unreachable` with p2pd's reason, `Offline` if p2pd is gone.
    """
    try:
        reader, writer = await asyncio.open_unix_connection(
            p2p._daemon_listen_maddr["unix"], limit=buffer_bytes
        )
    except OSError as e:
        raise Offline("this peer's p2pd has ended") from e
    try:
        await write_pbmsg(writer, request)
        response = p2pd_pb2.Response()
        await read_pbmsg_safe(reader, response)
        if response.type == p2pd_pb2.Response.ERROR:
            raise Unreachable(_reason(response.error.msg))
    except BaseException as e:
        writer.close()
        if isinstance(e, OSError | EOFError):
            raise Offline("this peer's p2pd has ended") from e
        raise
    return response, reader, writer


def _reason(message: str) -> str:
    """The one line of p2pd's error that tells a person most: about the latest thing it tried."""
    lines = [line.strip(" *")[:300] for line in message.splitlines() if line.strip()]
    fresh = [line for line in lines if "dial backoff" not in line]
    return (fresh or lines or ["refused"])[-1]
