"""Groups of one, two and three: who is alone certifies alone, and a death stops nobody for long."""

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import pytest

from dipaco.config import TopologyConfig
from dipaco.topology import ModuleID
from peer.attempt import Attempt
from peer.certificate import SLOTS_BEFORE_REBUILD
from peer.messages import Ballot
from tests.lab import LabPeer, lab
from tests.little_run import little_config
from tests.virtual_clock import run_virtual

T = TypeVar("T")
ROUND = 20.0  # virtual seconds
MODULE = ModuleID(0, 0)


@pytest.mark.parametrize("num_peers", [1, 2, 3])
def test_a_small_group_goes_on_when_one_of_it_dies(tmp_path: Path, num_peers: int) -> None:
    """The majority of three goes on at once; what is left of two, with a roster made anew."""

    async def scenario() -> None:
        config = replace(
            little_config(num_rounds=100, blocking=False), topology=TopologyConfig(levels=(1,))
        )
        async with lab(tmp_path, config) as place:
            await place.bootstrap()
            peers = [await place.join(f"peer{n}", step_seconds=3.0) for n in range(num_peers)]
            first, log = peers[0], peers[0].keeper.node.log
            await place.until(lambda: bool(first.seen("version")), within=60, what="a version")
            await place.leave("bootstrap")

            def seats() -> set[str]:
                certificate = log.held[MODULE].certificate
                assert certificate is not None
                return {seat.peer for seat in certificate.proposal.next_roster}

            group = {peer.peer_id for peer in peers}
            await place.until(lambda: seats() == group, within=6 * ROUND, what="a group of its own")
            if num_peers > 1:
                await place.kill(peers[-1].name)
            last = log.held[MODULE].certificate
            assert last is not None
            before, slot = last.version, last.ballot.slot
            await place.until(
                lambda: log.held[MODULE].version >= before + 2,
                within=(SLOTS_BEFORE_REBUILD + 4) * ROUND,
                what="two more versions",
            )
            after = [e for e in first.seen("version")
                     if e["module"] == str(MODULE) and e["version"] > before]  # fmt: skip
            assert [e["rebuilt"] for e in after] == [num_peers == 2, False]
            pause = SLOTS_BEFORE_REBUILD if num_peers == 2 else 0
            assert [e["slot"] for e in after] == [slot + 1 + pause, slot + 2 + pause]
            assert seats() == group - ({peers[-1].peer_id} if num_peers > 1 else set())

    run_virtual(scenario())


def test_a_leader_that_comes_after_its_slot_is_refused_by_all(tmp_path: Path) -> None:
    """As a starved process does; by itself too, which once ended its round with an error."""

    async def scenario() -> None:
        config = replace(
            little_config(num_rounds=100, blocking=False), topology=TopologyConfig(levels=(1,))
        )
        async with lab(tmp_path, config) as place:
            await place.bootstrap()
            first, other = [await place.join(f"peer{n}", step_seconds=3.0) for n in range(2)]
            keeper, node = first.keeper, first.keeper.node
            await place.until(lambda: len(first.seen("version")) > 1, within=120, what="versions")
            await place.leave("bootstrap")
            await place.kill(other.name)  # so that no other leader comes before
            slot = node.slot
            await place.until(lambda: node.slot == slot + 2, within=3 * ROUND, what="a later slot")
            held = node.log.held[MODULE]
            assert held.certificate is not None
            assert keeper.member.contributions.known(MODULE, slot)
            late = Attempt(
                node=node,
                member=keeper.member,
                heads=keeper.heads,
                held=held,
                ballot=Ballot(slot=slot, attempt=9, leader=node.peer_id),
                roster=held.certificate.proposal.next_roster,
                rebuilt=False,
                seconds=1.0,
            )
            await late.run()
            failed = [e for e in first.seen("attempt failed") if e["attempt"] == 9]
            assert [entry["why"].split(" of ")[0] for entry in failed] == ["0"]

    run_virtual(scenario())


def test_a_leader_that_computes_slowly_computes_once_and_holds_up_nobody(tmp_path: Path) -> None:
    """The others have a quorum without its vote; what it was to vote for it needs all the same."""

    async def scenario() -> None:
        config = replace(
            little_config(num_rounds=100, blocking=False), topology=TopologyConfig(levels=(1,))
        )
        async with lab(tmp_path, config) as place:
            await place.bootstrap()
            slow, *others = [await place.join(f"peer{n}", step_seconds=3.0) for n in range(3)]
            reducer, node = slow.keeper.member._reducer, slow.keeper.node

            async def offload(function: Callable[[], T]) -> T:
                result = await node.offload(function)
                await asyncio.sleep(1.0)
                return result

            reducer._node = replace(node, offload=offload)
            await place.until_versions(3, [slow, *others], within=6 * ROUND)
            begin = node.now()

            def led() -> set[str]:
                made = [entry for entry in slow.seen("publishing") if entry["time"] > begin]
                return {entry["certificate"] for entry in made}

            def applied(peer: LabPeer) -> dict[str, float]:
                return {entry["certificate"]: entry["time"] for entry in peer.seen("version")}

            await place.until(
                lambda: len(led()) > 1 and led() <= set(applied(slow)),
                within=12 * ROUND,
                what="versions that it has led to",
            )
            reduced = Counter(entry["proposal"] for entry in slow.seen("reducing"))
            assert set(reduced.values()) == {1}
            for peer in others:
                assert all(applied(peer)[made] < applied(slow)[made] for made in led())

    run_virtual(scenario())


def test_a_disk_that_fails_once_costs_a_peer_no_more_than_a_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with lab(tmp_path, little_config(num_rounds=100, blocking=False)) as place:
            bootstrap = await place.bootstrap()
            peer = await place.join("peer", step_seconds=2.0)
            await place.until_versions(1, [peer], within=6 * ROUND)
            contributions = peer.keeper.member.contributions
            forget_before = contributions.forget_before

            def failing(slot: int, *, kept: set[str]) -> None:
                monkeypatch.setattr(contributions, "forget_before", forget_before)
                raise OSError(5, "Input/output error")

            monkeypatch.setattr(contributions, "forget_before", failing)
            await place.until(
                lambda: any(e["where"] == "rounds" for e in peer.seen("error")),
                within=2 * ROUND,
                what="a disk that fails",
            )
            before, slot = max(peer.versions().values()), peer.keeper.node.slot
            await place.kill("bootstrap")
            await place.until(
                lambda: max(peer.versions().values()) >= before + 3, within=8 * ROUND, what="rounds"
            )
            assert slot < max(e["slot"] for e in peer.seen("proposing"))
            assert bootstrap.seen("version")

    run_virtual(scenario())
