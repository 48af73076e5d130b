"""A manifest is what its operator signed, or it is refused; so is a run of another protocol."""

import pytest

from dht.errors import BadMessage, RunMismatch
from dipaco.digest import blob_digest
from peer.manifest import Manifest, check_protocol, parse_manifest
from peer.messages import PROTOCOL_VERSION, sign
from tests.little_run import identity, little_config, make_run

RUN = make_run(little_config(), operator=identity(1), start_time=100.0)


def parse(manifest: Manifest) -> Manifest:
    raw = manifest.to_bytes()
    return parse_manifest(raw, digest=blob_digest(raw), sender="x")


def test_a_signed_manifest_comes_back() -> None:
    assert parse(RUN.manifest) == RUN.manifest
    assert RUN.manifest.slot_at(99.0) == -1
    assert RUN.manifest.slot_at(121.0) == 1


def test_bytes_of_another_digest_are_refused() -> None:
    with pytest.raises(BadMessage, match="digest"):
        parse_manifest(RUN.manifest.to_bytes(), digest="0" * 64, sender="x")


@pytest.mark.parametrize("change", [{"start_time": 0.0}, {"name": "other"}, {"version": 2}])
def test_a_tampered_manifest_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(BadMessage, match="not signed"):
        parse(RUN.manifest.model_copy(update=change))


def test_a_manifest_that_contradicts_itself_is_refused_even_if_signed() -> None:
    lies = [
        {"fingerprint": "0" * 64},
        {"shards": RUN.manifest.shards[1:]},
        {"starts": RUN.manifest.starts[1:]},
        {"config": {"name": "nothing else"}},
    ]
    for lie in lies:
        forged = sign(RUN.manifest.model_copy(update={**lie, "signature": ""}), identity(1))
        with pytest.raises(BadMessage):
            parse(forged)


def test_another_protocol_says_which_side_is_older() -> None:
    newer = RUN.manifest.model_copy(update={"protocol": PROTOCOL_VERSION + 1, "signature": ""})
    with pytest.raises(
        RunMismatch, match=f"the run speaks protocol {PROTOCOL_VERSION + 1}"
    ) as caught:
        parse(sign(newer, identity(1)))
    assert "this program is the older one" in caught.value.hint
    with pytest.raises(RunMismatch) as caught:
        check_protocol(PROTOCOL_VERSION - 1, "that peer")
    assert "that peer is the older one" in caught.value.hint
