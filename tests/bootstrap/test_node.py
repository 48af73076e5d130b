"""What the operator of a run is told to hand out."""

import pytest

from bootstrap.node import advice_on
from dht.addresses import outside
from tests.little_run import identity

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
