from __future__ import annotations

import subprocess
import sys

import pytest

from dht.addresses import split_maddr
from dht.errors import LocalFault
from dht.identity import Identity

PEER = Identity(b"\x01" * 32).peer_id
RELAY = Identity(b"\x02" * 32).peer_id


@pytest.mark.parametrize(
    "where",
    [
        "/ip4/127.0.0.1/tcp/4001",
        "/ip6/::1/tcp/4001",
        "/dns4/example.org/tcp/4001",
        f"/ip4/127.0.0.1/tcp/4001/p2p/{RELAY}/p2p-circuit",
    ],
)
def test_an_address_is_a_place_and_a_peer(where: str) -> None:
    assert split_maddr(f" {where}/p2p/{PEER}\n") == (where, PEER)


@pytest.mark.parametrize(
    "maddr",
    [
        "",
        "example.org:4001",
        "/ip4/127.0.0.1/tcp/4001",
        f"/ip4/127.0.0.256/tcp/4001/p2p/{PEER}",
        f"/ip4/127.0.0.1/tcp/65536/p2p/{PEER}",
        f"/ip4/127.0.0.1/udp/4001/p2p/{PEER}",
        f"/ip4/127.0.0.1/tcp/4001/p2p/{PEER[:-1]}",
        "/ip4/127.0.0.1/tcp/4001/p2p/QmcgpsyWgH8Y8ajJz1Cu72KnS5uo2Aa2LpzU7kinSupNKC",
        f"/p2p/{PEER}",
        "/ip4/127.0.0.1/tcp/1" * 1000 + f"/p2p/{PEER}",
    ],
)
def test_anything_else_gets_a_line_and_a_hint(maddr: str) -> None:
    with pytest.raises(LocalFault, match="is not the address of a peer") as caught:
        split_maddr(maddr)
    assert "/ip4/" in caught.value.hint


def test_only_the_doors_import_hivemind() -> None:
    modules = (
        "dht.addresses, dht.daemon, dht.errors, dht.identity, dht.keys, dht.memory, dht.records, "
        "dht.storage, dht.swarm, dht.validation, peer.framing, peer.memory, peer.transport"
    )
    code = f"import sys, {modules}; sys.exit('hivemind' in sys.modules or 'torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
