from __future__ import annotations

import subprocess
import sys

import pytest

from dht.addresses import host_of, is_global, ports_of, split_maddr
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


def test_ports_and_hosts_are_those_of_direct_addresses() -> None:
    circuit = f"/ip4/203.0.113.9/tcp/31337/p2p/{RELAY}/p2p-circuit/p2p/{PEER}"
    here = [f"/ip4/127.0.0.1/tcp/7/p2p/{PEER}", f"/ip6/::1/tcp/8/p2p/{PEER}", circuit]
    assert ports_of(here) == (7, 8)
    assert host_of([circuit]) is None
    assert host_of(["/ip6/2001:db8::7/tcp/1"]) == "/ip6/2001:db8::7"


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("/ip4/8.8.8.8", True),
        ("/ip6/2600::1", True),
        ("/dns4/example.org", True),
        ("/ip4/10.0.0.1", False),
        ("/ip4/100.64.0.1", False),
        ("/ip4/127.0.0.1", False),
        ("/ip6/::1", False),
        ("/ip6/fe80::1", False),
        ("/ip6/fd00::1", False),
        ("/ip4/no.such", False),
    ],
)
def test_addresses_that_lead_there_from_everywhere(host: str, expected: bool) -> None:
    assert is_global(f"{host}/tcp/1/p2p/{PEER}") is expected


def test_only_the_doors_import_hivemind() -> None:
    modules = (
        "dht.addresses, dht.daemon, dht.errors, dht.identity, dht.keys, dht.memory, dht.records, "
        "dht.storage, dht.swarm, dht.validation, peer.framing, peer.memory, peer.transport"
    )
    code = f"import sys, {modules}; sys.exit('hivemind' in sys.modules or 'torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
