from __future__ import annotations

import asyncio
import errno
from contextlib import aclosing
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from dht.addresses import is_global
from dht.daemon import DaemonConfig
from dipaco.checkpoint import write_atomically
from peer.dial_back import DIAL_BACK_PROTOCOL, DialBack, DialBackReply, DialBackRequest
from peer.events import EventLog
from peer.join import others, stay_reachable
from peer.memory import MemoryNetwork
from peer.reachability import Reachability, Standing, reached, relays_of, verdict
from tests.little_run import identity
from tests.peer.dialling import Dials, FakeSwarm
from tests.virtual_clock import run_virtual

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

US, ASKER, OTHER, LIAR = (identity(number).peer_id for number in (1, 2, 3, 4))
OUTSIDE = "/ip4/8.8.8.8"
PUBLIC = f"/ip4/203.0.113.9/tcp/31337/p2p/{OTHER}"


def reply(*, seen: str | None = "/ip4/203.0.113.7", reached: tuple[int, ...] = ()) -> DialBackReply:
    return DialBackReply(seen=seen, reached=reached, relay=())


def test_the_majority_of_those_who_tried_decides() -> None:
    yes, no, could_not_try = reply(reached=(1,)), reply(), reply(seen=None)
    assert verdict([]) is None
    assert verdict([could_not_try]) is None
    assert verdict([yes, could_not_try]) is True
    assert verdict([yes, yes, no]) is True
    assert verdict([yes, no]) is False, "through a relay one is reached in any case"
    elsewhere = reply(seen="/ip4/203.0.113.9", reached=(1,))
    assert verdict([yes, elsewhere]) is False, "there is no place to announce"


def test_who_dials_from_the_same_network_proves_nothing_about_those_outside() -> None:
    outside_yes, outside_no = reply(seen=OUTSIDE, reached=(1,)), reply(seen=OUTSIDE)
    for at_home in ("/ip4/192.168.1.2", "/ip4/127.0.0.1", "/ip4/100.64.0.2", "/ip6/fd00::1"):
        yes, no = reply(seen=at_home, reached=(1,)), reply(seen=at_home)
        assert verdict([yes, yes, outside_no]) is False
        assert verdict([no, no, outside_yes]) is True
        assert verdict([yes, reply(seen=None)]) is True, "there is nobody else"
        assert verdict([yes, no]) is False


def test_no_address_is_announced_that_only_one_of_several_names() -> None:
    honest, liar = reply(seen=OUTSIDE, reached=(4000,)), reply(seen="/ip4/9.9.9.9", reached=(1, 1))
    assert reached([honest, honest, liar]) == [f"{OUTSIDE}/tcp/4000"]
    assert reached([honest, liar]) == []
    assert reached([honest, liar, reply(seen=OUTSIDE)]) == []
    assert reached([reply(seen=OUTSIDE, reached=(4000, 5)), honest]) == [f"{OUTSIDE}/tcp/4000"]
    assert reached([honest, reply(seen=None)]) == [f"{OUTSIDE}/tcp/4000"], "it could not try"


def test_those_who_only_say_that_they_train_are_asked_by_lot() -> None:
    class Announced:
        async def read(self, _key: str) -> list[SimpleNamespace]:
            return [SimpleNamespace(peer=f"trainer {number}") for number in range(20)]

    manifest = SimpleNamespace(topology=SimpleNamespace(paths=["0.0", "0.1"]))
    node = SimpleNamespace(swarm=Announced(), manifest=manifest, run="run", peer_id="trainer 7")
    providers = SimpleNamespace(hints=["trainer 7", "given"])

    async def main() -> list[list[str]]:
        return [await others(node, providers) for _ in range(20)]  # type: ignore[arg-type]

    asked = asyncio.run(main())
    assert all(peers[0] == "given" and len(peers) == 20 == len(set(peers)) for peers in asked)
    assert all(node.peer_id not in peers for peers in asked)
    assert len({peers[1] for peers in asked}) > 1


def test_a_relay_can_only_propose_itself_where_it_is_dialled() -> None:
    def proposing(*maddrs: str) -> dict[str, DialBackReply]:
        return {OTHER: DialBackReply(seen=None, reached=(), relay=maddrs)}

    assert relays_of(proposing(PUBLIC, PUBLIC)) == (PUBLIC,)
    assert relays_of(proposing(f"/ip4/203.0.113.9/tcp/31337/p2p/{ASKER}")) == ()
    assert relays_of(proposing(f"/ip4/1.1.1.1/tcp/1/p2p/{US}/p2p-circuit/p2p/{OTHER}")) == ()
    assert relays_of(proposing(f"{PUBLIC},{PUBLIC}", "/nonsense", f"/dns/x/p2p/{OTHER}")) == ()


def test_who_is_relayed_is_told_what_to_forward() -> None:
    circuit = f"{PUBLIC}/p2p-circuit/p2p/{US}"
    standing = Standing(is_dialled=False, maddrs=(circuit,), port=7)
    assert standing.relays == (OTHER,)
    assert standing.text == (
        f"others cannot dial you: taking part through relay {OTHER}; "
        "forward TCP port 7 to this machine for better throughput"
    )


class Home:
    """A machine of ours, as swarm and watchdog; `OTHER` dials it back, and relays."""

    def __init__(self, *own: str) -> None:
        self.own = list(own)
        self.config = DaemonConfig(host_maddrs=("/ip4/0.0.0.0/tcp/4000",))
        self.restarts: list[DaemonConfig] = []
        self.reply = reply(seen=None)
        self.network = MemoryNetwork(seed=0)
        self.transport = self.network.transport(OTHER)

    async def maddrs(self) -> list[str]:
        """As p2pd does, which names no public address of its own while it is hidden."""
        relays = self.config.trusted_relays
        places = [
            p for p in self.config.announce_maddrs or self.own if not relays or not is_global(p)
        ]
        circuits = [f"{relay}/p2p-circuit" for relay in relays]
        return [f"{place}/p2p/{US}" for place in [*places, *circuits]]

    async def restart(self, config: DaemonConfig) -> None:
        self.config = config
        self.restarts.append(config)

    async def reachability(self) -> Reachability:
        async def answer(_asker: str, payload: bytes) -> AsyncIterator[bytes]:
            ports = DialBackRequest.from_bytes(payload, sender=US).ports
            assert set(self.reply.reached) <= set(ports), "only what is asked for is dialled"
            yield self.reply.to_bytes()

        await self.transport.serve(DIAL_BACK_PROTOCOL, answer, max_request_bytes=4096)
        return Reachability(self, self.network.transport(US), self)  # type: ignore[arg-type]


async def asked() -> list[str]:
    return [OTHER]


def test_one_liar_among_the_witnesses_moves_nothing() -> None:
    async def main() -> None:
        home = Home("/ip4/192.168.1.2/tcp/4000")
        home.reply = reply(seen=OUTSIDE, reached=(4000,))
        reachability = await home.reachability()
        third_parties = iter(range(1, 10))

        async def agree(_asker: str, _payload: bytes) -> AsyncIterator[bytes]:
            yield home.reply.to_bytes()

        async def lie(_asker: str, _payload: bytes) -> AsyncIterator[bytes]:
            seen = f"/ip4/9.9.9.{next(third_parties)}"
            yield reply(seen=seen, reached=(4000,)).to_bytes()

        for peer, answer in ((ASKER, agree), (LIAR, lie)):
            transport = home.network.transport(peer)
            await transport.serve(DIAL_BACK_PROTOCOL, answer, max_request_bytes=4096)
        for _ in range(3):
            await reachability.settle([LIAR, OTHER, ASKER])
        assert home.config.announce_maddrs == (f"{OUTSIDE}/tcp/4000", *home.own)
        assert len(home.restarts) == 1
        assert next(third_parties) == 4, "it was asked each time"

    run_virtual(main())


def test_reachability_is_judged_again_and_overturned_only_by_two_answers() -> None:
    async def main() -> None:
        home = Home(f"{OUTSIDE}/tcp/4000")
        yes = reply(seen=OUTSIDE, reached=(4000,))
        no = DialBackReply(seen=OUTSIDE, reached=(), relay=(PUBLIC,))
        home.reply = yes
        reachability = await home.reachability()
        first = await reachability.settle(await asked())
        assert first.text == f"reachable from outside at {OUTSIDE}/tcp/4000/p2p/{US}"
        answers = iter([no, yes, no, no, yes, no, yes, yes])

        async def asked_later() -> list[str]:
            home.reply = next(answers)
            return await asked()

        loop = asyncio.get_running_loop()
        begin = loop.time()
        async with aclosing(reachability.changes(asked_later)) as changes:
            hidden = await anext(changes)
            assert hidden.is_dialled is False
            assert hidden.relays == (OTHER,)
            assert hidden.port == 4000
            minutes = 15 + 1 + 15 + 1  # the first doubt was none
            assert loop.time() - begin == pytest.approx(60 * minutes, abs=1)
            again = await anext(changes)
            assert again == first
            assert not home.config.is_hidden
        assert list(answers) == []
        assert len(home.restarts) == 2

    run_virtual(main())


def test_a_forwarded_port_is_announced_in_each_network_anew() -> None:
    async def main() -> None:
        home = Home("/ip4/192.168.1.2/tcp/4000")
        home.reply = reply(seen=OUTSIDE, reached=(4000,))
        reachability = await home.reachability()
        await reachability.settle(await asked())
        assert home.config.announce_maddrs == (f"{OUTSIDE}/tcp/4000", *home.own)
        async with aclosing(reachability.changes(asked)) as changes:
            home.own = ["/ip4/10.0.0.7/tcp/4000"]
            home.reply = reply(seen="/ip4/9.9.9.9", reached=(4000,))
            moved = await anext(changes)
            assert moved.text == f"reachable from outside at /ip4/9.9.9.9/tcp/4000/p2p/{US}"
            assert home.config.announce_maddrs == ("/ip4/9.9.9.9/tcp/4000", *home.own)
            home.reply = reply(seen="/ip6/2600::7", reached=(4000,))
            both = ("/ip4/9.9.9.9/tcp/4000", "/ip6/2600::7/tcp/4000", *home.own)
            await anext(changes)
            assert home.config.announce_maddrs == both
            num_restarts = len(home.restarts)
            home.reply = reply(seen="/ip4/9.9.9.9", reached=(4000,))
            await reachability.settle(await asked())
            assert len(home.restarts) == num_restarts, "it is announced already"

    run_virtual(main())


def test_whoever_is_alone_in_a_network_says_no_more_than_that() -> None:
    async def main() -> None:
        home = Home("/ip4/192.168.1.2/tcp/4000")
        home.reply = reply(seen="/ip4/192.168.1.2", reached=(4000,))
        reachability = await home.reachability()
        standing = await reachability.settle(await asked())
        where = f"/ip4/192.168.1.2/tcp/4000/p2p/{US}"
        assert standing.text == f"reachable on this network at {where}"
        assert home.restarts == []
        home.reply = reply(seen=None)
        assert await reachability.settle(await asked()) == standing, "nobody contradicts it"

    run_virtual(main())


class FakeWatchdog:
    """Restarts nothing; the relays of its configuration are where we are reached."""

    def __init__(self, swarm: FakeSwarm) -> None:
        self.config = DaemonConfig()
        self._swarm = swarm

    async def restart(self, config: DaemonConfig) -> None:
        self.config = config
        self._swarm.own = [f"{relay}/p2p-circuit/p2p/{ASKER}" for relay in config.trusted_relays]


def test_a_lost_relay_is_replaced() -> None:
    async def main() -> None:
        network = MemoryNetwork(seed=0)
        seen_at = ["/ip4/203.0.113.7/tcp/5"]
        for number, peer in ((1, US), (3, OTHER)):
            swarm = FakeSwarm(ASKER, seen_at, [f"/ip4/203.0.113.{number}/tcp/1/p2p/{peer}"])
            transport = network.transport(peer)
            transport.connect = Dials({})  # type: ignore[method-assign]
            await DialBack(swarm, transport, is_relay=True).serve()  # type: ignore[arg-type]
        ours = FakeSwarm(ASKER, [], [f"/ip4/192.168.1.2/tcp/4000/p2p/{ASKER}"])
        watchdog = FakeWatchdog(ours)
        reachability = Reachability(ours, network.transport(ASKER), watchdog)  # type: ignore[arg-type]
        assert (await reachability.settle([US])).relays == (US,)
        assert watchdog.config.is_hidden

        async def others() -> list[str]:
            return [OTHER]

        ours.own = []
        async with aclosing(reachability.changes(others)) as changes:
            assert (await anext(changes)).relays == (OTHER,)

    run_virtual(main())


def test_a_full_disk_ends_nothing_but_one_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Moving:
        """Reached at another address each time, without end."""

        num_looks = 0

        async def changes(self, _peers: object) -> AsyncIterator[Standing]:
            while True:
                await asyncio.sleep(60)
                self.num_looks += 1
                where = f"/ip4/8.8.8.{self.num_looks}/tcp/1"
                yield Standing(is_dialled=True, maddrs=(where,), port=1)

    moving, full = Moving(), [OSError(errno.ENOSPC, "No space left on device")]
    seen: list[str] = []

    def write(file: Path, data: bytes) -> None:
        if full:
            raise full.pop()
        write_atomically(file, data)

    async def main() -> None:
        events = EventLog(tmp_path / "events.jsonl", lambda: 0.0)
        events.listen(lambda entry: seen.append(entry["event"]))
        keeper = SimpleNamespace(
            node=SimpleNamespace(events=events), providers=None, presence=SimpleNamespace()
        )
        network = SimpleNamespace(reachability=moving)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(150):
                await stay_reachable(network, keeper, tmp_path)  # type: ignore[arg-type]
        events.close()

    monkeypatch.setattr("peer.join.write_atomically", write)
    run_virtual(main())
    assert seen == ["reachability", "error", "reachability"]
    assert (tmp_path / "address").read_text() == "/ip4/8.8.8.2/tcp/1\n"
