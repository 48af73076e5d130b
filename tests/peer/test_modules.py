"""A module's versions on disk: a damaged newest one gives way to the one before."""

from pathlib import Path

import pytest
import torch

from dipaco.checkpoint import ModuleState, encode_state
from dipaco.topology import ModuleID
from peer.history import History
from peer.messages import Certificate
from peer.modules import ModuleLog
from peer.store import BlobStore
from tests.lab import identity, little_config, make_run
from tests.peer.test_certificate import PEERS, certificate, commitment, proposal

MODULE = ModuleID(1, 0)
RUN = make_run(little_config(), operator=identity(1), start_time=0.0)


class Place:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.store = BlobStore(directory / "blobs")
        for blob in RUN.blobs:
            self.store.add(blob)
        self.log = self.reopened()
        self.log.adopt(MODULE, [])

    def reopened(self) -> ModuleLog:
        store = BlobStore(self.directory / "blobs")
        history = History(RUN.manifest, store, self.directory / "manifests")
        return ModuleLog(self.directory / "modules", history, store)

    def advance(self) -> Certificate:
        """One more version, with some state."""
        held = self.log.held[MODULE]
        size = self.log.num_parameters(MODULE)
        state = ModuleState.initial(torch.full((size,), float(held.version + 1)))
        result = self.store.add(encode_state(state))
        contribution = commitment(PEERS[0], base_version=held.version, base_state=held.state)
        what = proposal(
            PEERS[:1],
            version=held.version + 1,
            parent=held.parent,
            contributions=(contribution,),
        )
        made = certificate(what, PEERS[:1]).model_copy(update={"result": result})
        self.log.adopt(MODULE, [*held.chain, made])
        return made


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_a_restart_finds_the_newest_version(place: Place) -> None:
    place.advance()
    newest = place.advance()
    held = place.reopened().open(MODULE)
    assert held is not None
    assert (held.version, held.state) == (2, newest.result)


@pytest.mark.parametrize("damage", ["truncated state", "garbled certificate"])
def test_a_damaged_version_gives_way_to_the_one_before(place: Place, damage: str) -> None:
    before, newest = place.advance(), place.advance()
    if damage == "truncated state":
        file = place.store.file(newest.result)
        file.write_bytes(file.read_bytes()[:100])
    else:
        (place.directory / "modules" / str(MODULE) / "00000002.json").write_text("{}")
    log = place.reopened()
    held = log.open(MODULE)
    assert held is not None
    assert (held.version, held.state) == (1, before.result)
    assert torch.equal(log.load_state(MODULE).parameters, torch.ones(log.num_parameters(MODULE)))


def test_old_states_are_deleted_and_the_start_is_kept(place: Place) -> None:
    versions = [place.advance() for _ in range(5)]
    kept = [certificate.result in place.store for certificate in versions]
    assert kept == [False, False, False, True, True]
    assert RUN.manifest.starts[MODULE.level].digest in place.store
