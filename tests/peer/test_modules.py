"""A module's versions on disk: a damaged newest one gives way to the one before."""

from pathlib import Path

import pytest
import torch

from dht.errors import LocalFault
from dipaco.checkpoint import ModuleState, encode_state
from dipaco.topology import ModuleID, PathID
from peer.archive import WHOLE_KEPT, Archived, shares, whole
from peer.history import History
from peer.messages import Certificate
from peer.modules import ModuleLog, counted_tokens
from peer.store import BlobStore
from tests.little_run import identity, little_config, make_run
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
    log = place.reopened()
    held = log.open(MODULE)
    assert held is not None
    assert (held.version, held.state) == (2, newest.result)
    assert not log.held, "that is for the event loop, which may be looking through it"


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
    log.held[MODULE] = held
    assert torch.equal(log.load_state(MODULE).parameters, torch.ones(log.num_parameters(MODULE)))


def test_a_history_that_was_replaced_in_part_ends_where_the_two_part(place: Place) -> None:
    """Killed while the winner of a fork was adopted, whose certificates are written one by one."""
    place.advance()
    parted = place.log.held[MODULE]
    lost = [place.advance() for _ in range(3)]
    contribution = commitment(
        PEERS[1], base_version=parted.version, base_state=parted.state, tokens=7
    )
    what = proposal(PEERS[1:2], version=2, parent=parted.parent, contributions=(contribution,))
    won = certificate(what, PEERS[1:2]).model_copy(update={"result": lost[0].result})
    directory = place.directory / "modules" / str(MODULE)
    (directory / "00000002.json").write_bytes(won.to_bytes())
    size = place.log.num_parameters(MODULE)
    for value in (2.0, 3.0, 4.0):
        place.store.add(encode_state(ModuleState.initial(torch.full((size,), value))))
    held = place.reopened().open(MODULE)
    assert held is not None
    assert [link.digest for link in held.chain[1:]] == [won.digest]


def test_old_states_are_deleted_and_the_start_is_kept(place: Place) -> None:
    versions = [place.advance() for _ in range(5)]
    kept = [certificate.result in place.store for certificate in versions]
    assert kept == [False, False, False, True, True]
    assert RUN.manifest.starts[MODULE.level].digest in place.store


def test_old_certificates_are_read_from_the_disk_again(place: Place) -> None:
    made = [place.advance() for _ in range(WHOLE_KEPT + 3)]
    again = place.reopened().open(MODULE)
    assert again is not None
    for held in (place.log.held[MODULE], again):
        is_old = [isinstance(link, Archived) for link in held.chain]
        assert is_old == [True] * 3 + [False] * WHOLE_KEPT
        assert [whole(link).to_bytes() for link in held.chain] == [c.to_bytes() for c in made]
        assert [shares(link) for link in held.chain] == [
            shares(certificate) for certificate in made
        ]
        assert [link.digest for link in held.after(1)] == [c.digest for c in made[1:]]
        assert counted_tokens(held.chain, PathID.parse("0.0")) == 100 * len(made)
    assert place.log.versions_on_disk(MODULE)[-2:] == [
        (1, made[0].result),
        (0, place.log.held[MODULE].origin.state.digest),
    ]


def test_an_old_certificate_is_never_another_one_in_its_place(place: Place) -> None:
    made = [place.advance() for _ in range(WHOLE_KEPT + 2)]
    old, other, *_ = place.log.held[MODULE].chain
    directory = place.directory / "modules" / str(MODULE)
    (directory / "00000001.json").write_bytes(made[1].to_bytes())
    (directory / "00000002.json").unlink()
    for link in (old, other):
        with pytest.raises(LocalFault):
            whole(link)


def test_a_history_that_falls_back_is_whole_at_its_end_again(place: Place) -> None:
    made = [place.advance() for _ in range(3 * WHOLE_KEPT)]
    short = place.log.held[MODULE].chain[: WHOLE_KEPT + 1]
    assert isinstance(short[-1], Archived)
    size = place.log.num_parameters(MODULE)
    place.store.add(encode_state(ModuleState.initial(torch.full((size,), float(len(short))))))
    held = place.log.adopt(MODULE, short)
    assert [isinstance(link, Certificate) for link in held.chain] == [False] + [True] * WHOLE_KEPT
    assert held.certificate == made[WHOLE_KEPT]
