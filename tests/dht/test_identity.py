from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dht.errors import LocalFault
from dht.identity import Identity, peer_id_bytes, public_key_of, verify

if TYPE_CHECKING:
    from pathlib import Path

# the Ed25519 test vector of the libp2p specification of peer IDs
PRIVATE_KEY = bytes.fromhex(
    "080112407e0830617c4a7de83925dfb2694556b12936c477a0e1feb2e148ec9da60fee7d"
    "1ed1e8fae2c4a144b8be8fd4b47bf3d3b34b871c3cacf6010f0e42d474fce27e"
)


def test_reads_the_key_of_the_libp2p_specification(tmp_path: Path) -> None:
    file = tmp_path / "identity.key"
    file.write_bytes(PRIVATE_KEY)
    identity = Identity.load_or_create(file)
    assert identity.to_bytes() == PRIVATE_KEY
    assert public_key_of(identity.peer_id) == PRIVATE_KEY[-32:]
    assert identity.peer_id.startswith("12D3KooW")
    assert peer_id_bytes(identity.peer_id) == bytes.fromhex("002408011220") + PRIVATE_KEY[-32:]


def test_a_new_identity_is_kept_and_private(tmp_path: Path) -> None:
    file = tmp_path / "state" / "identity.key"
    identity = Identity.load_or_create(file)
    assert Identity.load_or_create(file).peer_id == identity.peer_id
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [entry.name for entry in file.parent.iterdir()] == ["identity.key"]


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_hard_links_keeps_an_identity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def no_link(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("os.link", no_link)
    file = tmp_path / "identity.key"
    identity = Identity.load_or_create(file)
    assert Identity.load_or_create(file).peer_id == identity.peer_id
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [entry.name for entry in tmp_path.iterdir()] == ["identity.key"]
    with pytest.raises(FileExistsError):
        Identity(b"\x07" * 32)._save(file)
    assert file.read_bytes() == identity.to_bytes(), "another process was faster"


def test_a_key_that_cannot_be_written_leaves_no_part_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(LocalFault, match="No space left"):
        Identity.load_or_create(tmp_path / "identity.key")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "raw",
    [b"", PRIVATE_KEY[:-1], PRIVATE_KEY + b"\0", PRIVATE_KEY[:-1] + b"\0", b"\x08\x00" * 34],
    ids=["empty", "truncated", "longer", "other public key", "an RSA key"],
)
def test_a_damaged_file_is_refused_and_not_overwritten(tmp_path: Path, raw: bytes) -> None:
    file = tmp_path / "identity.key"
    file.write_bytes(raw)
    with pytest.raises(LocalFault, match="damaged") as caught:
        Identity.load_or_create(file)
    assert caught.value.hint
    assert file.read_bytes() == raw


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(LocalFault, match="identity file"):
        Identity.load_or_create(tmp_path / "file" / "identity.key")


def test_the_key_is_never_shown() -> None:
    identity = Identity(b"\x07" * 32)
    assert repr(identity) == f"Identity({identity.peer_id})"


def test_verifies_only_its_own_signature() -> None:
    ours, theirs = Identity(b"\x01" * 32), Identity(b"\x02" * 32)
    signature = ours.sign(b"message")
    assert verify(ours.peer_id, b"message", signature)
    assert not verify(ours.peer_id, b"messagf", signature)
    assert not verify(theirs.peer_id, b"message", signature)
    assert not verify(ours.peer_id, b"message", signature[:-1])


@given(st.text(max_size=64), st.binary(max_size=80), st.binary(max_size=80))
def test_garbage_is_never_verified(peer_id: str, message: bytes, signature: bytes) -> None:
    assert not verify(peer_id, message, signature)
