"""A version counts before its state is on the disk: who is killed then computes it again."""

from pathlib import Path

import pytest

from dipaco.topology import ModuleID
from peer.history import History
from peer.modules import ModuleLog
from peer.store import BlobStore
from tests.lab import Lab, LabPeer, lab
from tests.little_run import little_config
from tests.virtual_clock import run_virtual

ROUND = 10.0  # virtual seconds


def reopened(place: Lab, peer: LabPeer) -> ModuleLog:
    """The modules that a new process would find on the disk of `peer`."""
    directory = place.directory / peer.name
    store = BlobStore(directory / "blobs")
    history = History(place.run.manifest, store, directory / "manifests")
    return ModuleLog(directory / "modules", history, store)


def test_everyone_is_killed_with_states_in_memory_and_no_version_is_lost(tmp_path: Path) -> None:
    async def scenario() -> None:
        config = little_config(num_rounds=100, round_seconds=ROUND, wire_format="int4")
        async with lab(tmp_path, config) as place:
            await place.bootstrap()
            for number in range(4):
                await place.join(f"peer{number}")
            peers = list(place.peers.values())
            await place.until_versions(2, peers, within=8 * ROUND)
            for peer in peers:
                peer.keeper.node.store.flush = lambda digest: None  # type: ignore[method-assign]
            before = {peer.name: peer.versions() for peer in peers}
            await place.until(
                lambda: all(p.versions()[m] > v for p in peers for m, v in before[p.name].items()),
                within=4 * ROUND,
                what="another version of everything",
            )
            held = {peer.name: dict(peer.keeper.node.log.held) for peer in peers}
            for peer in peers:
                await place.kill(peer.name)
            for peer in peers:
                log = reopened(place, peer)
                store = BlobStore(place.directory / peer.name / "blobs")
                for module, had in held[peer.name].items():
                    assert had.state not in store, "the fault: it was on the disk after all"
                    again = log.open(module)
                    assert again is not None
                    assert (again.version, again.state) == (had.version, had.state)
                    log.held[module] = again
                    assert log.load_state(module).num_parameters == log.num_parameters(module)

    run_virtual(scenario())


@pytest.mark.parametrize("fault", ["contribution gone", "disk full"])
def test_what_cannot_be_computed_again_leaves_the_version_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    full = 0

    def put(*_: object) -> None:
        nonlocal full
        full += 1
        raise OSError("no space left on device")

    async def scenario() -> None:
        config = little_config(num_rounds=100, round_seconds=ROUND, wire_format="int4")
        async with lab(tmp_path, config) as place:
            await place.bootstrap()
            peer = await place.join("peer0")
            module = ModuleID(0, 0)
            node = peer.keeper.node
            await place.until(
                lambda: peer.versions().get(str(module), 0) >= 1, within=60, what="a version"
            )
            node.store.flush = lambda digest: None  # type: ignore[method-assign]
            await place.until(
                lambda: peer.versions()[str(module)] >= 2, within=3 * ROUND, what="another"
            )
            certificate = node.log.held[module].certificate
            assert certificate is not None
            await place.kill("peer0")
            log = reopened(place, peer)
            if fault == "disk full":
                monkeypatch.setattr(BlobStore, "put", put)
            else:
                store = BlobStore(place.directory / "peer0" / "blobs")
                store.remove(certificate.proposal.contributions[0].blob)
            again = log.open(module)
            assert again is not None
            assert again.version == certificate.version - 1
            assert full == (fault == "disk full")

    run_virtual(scenario())
