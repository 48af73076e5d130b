"""What the operator of a run is told to hand out."""

import pytest

from bootstrap.node import advice_on
from peer.reachability import is_global, outside
from tests.lab import identity

PEER = f"/p2p/{identity(1).peer_id}"
HERE, AT_HOME, EVERYWHERE = (
    f"/ip4/{host}/tcp/31337{PEER}" for host in ("127.0.0.1", "192.168.1.2", "8.8.8.8")
)
NAME = f"/dns4/example.org/tcp/31337{PEER}"


@pytest.mark.parametrize(
    ("addresses", "offered", "advice"),
    [
        ([HERE], [HERE], "cannot use a private address: forward the port"),
        ([HERE, AT_HOME], [AT_HOME], "cannot use a private address: forward the port"),
        ([HERE, AT_HOME, EVERYWHERE], [AT_HOME, EVERYWHERE], "take the other lines, or forward"),
        ([HERE, EVERYWHERE], [EVERYWHERE], None),
        ([NAME], [NAME], None),
    ],
)
def test_strangers_are_offered_what_they_can_use(
    addresses: list[str], offered: list[str], advice: str | None
) -> None:
    assert outside(addresses) == offered
    said = advice_on(addresses)
    if advice is None:
        assert said == ""
    else:
        assert advice in said
        assert "`--announce-maddr`" in said


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
    assert is_global(f"{host}/tcp/1{PEER}") is expected
