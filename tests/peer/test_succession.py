"""What the next manifest may change, and what makes it one that nobody follows."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dht.errors import BadMessage
from dht.identity import Identity
from dipaco.checkpoint import state_bytes
from dipaco.config import RunConfig, TopologyConfig
from dipaco.digest import blob_digest
from dipaco.errors import ConfigError
from dipaco.model import num_parameters
from dipaco.topology import ModuleID, Topology
from peer.history import History
from peer.manifest import BlobRef, Manifest, Origin, parse_manifest
from peer.messages import sign
from peer.store import BlobStore
from peer.succession import ManifestDraft, check_successor, grown, source_of, successor
from tests.little_run import identity, little_config, make_run, make_shards, shard_refs

CONFIG = little_config()
OPERATOR = identity(1)
FIRST = make_run(CONFIG, operator=OPERATOR, start_time=0.0).manifest


def next_manifest(
    old: Manifest, config: RunConfig = CONFIG, *, by: Identity = OPERATOR, **changes: Any
) -> Manifest:
    """A sound successor but for `changes`, signed, as it comes from the wire."""
    draft = ManifestDraft(
        config=config,
        router=old.router,
        shards=shard_refs(config, make_shards(config, seed=old.version)),
        num_phases=old.num_phases,
    )
    topology = Topology.of(config)
    newest = {m: Origin(version=5, state=state_ref(topology, m)) for m in topology.modules}
    made = successor(old, draft, first_slot=old.first_slot + 4, newest=newest)
    raw = sign(made.model_copy(update={"peer": by.peer_id, **changes}), by).to_bytes()
    return Manifest.from_bytes(raw, sender="x")


def state_ref(topology: Topology, module: ModuleID) -> BlobRef:
    size = num_parameters(CONFIG.model, topology, module)
    return BlobRef(digest="c" * 64, num_bytes=state_bytes(size))


def config_with(**sections: dict[str, Any]) -> RunConfig:
    """`CONFIG` but for some values of some sections."""
    values = CONFIG.to_dict()
    for section, changed in sections.items():
        values[section] |= changed
    return RunConfig.from_dict(values)


def with_levels(*levels: int, **topology: Any) -> RunConfig:
    return replace(CONFIG, topology=TopologyConfig(levels=levels, **topology))


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        with_levels(3, 2),
        config_with(
            inner={"learning_rate": 0.1}, outer={"momentum": 0.5}, rounds={"num_rounds": 9}
        ),
    ],
    ids=["same", "grown", "settings"],
)
def test_new_shards_more_modules_and_other_settings_are_followed(config: RunConfig) -> None:
    second = next_manifest(FIRST, config)
    check_successor(second, FIRST, sender="x")
    check_successor(next_manifest(second, config), second, sender="x")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"by": identity(2)}, "another operator"),
        ({"version": 3}, "not the next version"),
        ({"predecessor": "d" * 64}, "another predecessor"),
        ({"first_slot": 0}, "begins before"),
        ({"num_phases": 2}, "leaves out a phase"),
        ({"start_time": 1.0}, "start_time"),
        ({"tokenizer": FIRST.router}, "tokenizer"),
        ({"config": config_with(model={"ffn_width": 64})}, "model"),
        ({"config": config_with(corpus={"max_documents": 7})}, "corpus"),
        ({"config": config_with(rounds={"round_seconds": 7.0})}, "round_seconds"),
        ({"config": with_levels(2, 1)}, "may only grow"),
        ({"config": with_levels(2, 2, path_specific_embedding=True)}, "path-specific"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_whoever_shows_another_manifest_is_named(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(BadMessage, match=why) as caught:
        check_successor(next_manifest(FIRST, **changes), FIRST, sender="liar")
    assert caught.value.peer_id == "liar"


def test_new_modules_are_born_once_and_whole_from_those_that_exist() -> None:
    sound = next_manifest(FIRST, with_levels(3, 2))
    [birth] = sound.births
    assert (birth.module, birth.source, birth.version) == ("1.2", "1.0", 5)
    unsound = [
        (),
        (birth, birth),
        (birth.model_copy(update={"source": "2.0"}),),
        (birth.model_copy(update={"source": "1.2"}),),
        (birth.model_copy(update={"state": BlobRef(digest="c" * 64, num_bytes=1)}),),
    ]
    for births in unsound:
        with pytest.raises(BadMessage, match="born"):
            check_successor(
                next_manifest(FIRST, with_levels(3, 2), births=births), FIRST, sender="x"
            )


def test_path_specific_modules_grow_only_where_they_keep_their_numbers() -> None:
    single = with_levels(1, 1, path_specific_embedding=True)
    four = grown(single, (2, 2))
    old, new = Topology.of(single), Topology.of(four)
    assert source_of(ModuleID(0, 3), old, new) == ModuleID(0, 0)
    six = grown(four, (3, 2))
    # Path 2.1 begins as path 0.1, in every level.
    assert source_of(ModuleID(0, 5), new, Topology.of(six)) == ModuleID(0, 1)
    assert source_of(ModuleID(1, 2), new, Topology.of(six)) == ModuleID(1, 0)
    with pytest.raises(ConfigError, match="other numbers"):
        grown(four, (2, 3))
    with pytest.raises(ConfigError, match="the same"):
        grown(four, (2, 2))


def test_the_history_says_what_is_in_force_and_survives_a_restart(tmp_path: Path) -> None:
    def opened() -> History:
        return History(FIRST, BlobStore(tmp_path / "blobs"), tmp_path / "manifests")

    history = opened()
    second = next_manifest(FIRST, with_levels(3, 2))
    third = next_manifest(second, with_levels(3, 2))
    assert [history.add(m, sender="x") for m in (second, third, second)] == [True, True, False]
    for known in (history, opened()):
        assert [known.at(slot).version for slot in (-1, 3, 4, 7, 8, 99)] == [1, 1, 2, 2, 3, 3]
        assert known.origin(ModuleID(1, 2)).version == 5
        assert known.origin(ModuleID(1, 1)).version == 0
    BlobStore(tmp_path / "blobs").file(third.digest).write_bytes(b"rotten")
    assert opened().newest == second


def test_of_two_manifests_of_one_version_the_first_is_kept(tmp_path: Path) -> None:
    history = History(FIRST, BlobStore(tmp_path / "blobs"), tmp_path / "manifests")
    second, other = next_manifest(FIRST), next_manifest(FIRST, with_levels(3, 2))
    history.add(second, sender="x")
    with pytest.raises(BadMessage, match="two manifests of version 2") as caught:
        history.add(other, sender="x")
    assert caught.value.peer_id == OPERATOR.peer_id
    assert history.newest == second


def test_other_bytes_of_a_signed_manifest_are_refused() -> None:
    """Or anyone could make many digests of one manifest."""
    raw = FIRST.to_bytes().replace(b'":', b'": ', 1)
    digest = blob_digest(raw)
    with pytest.raises(BadMessage, match="canonical"):
        parse_manifest(raw, digest=digest, sender="x")
