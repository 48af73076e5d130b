"""A peer's identity: one Ed25519 key, both its libp2p peer ID and the signature on its records.

The peer ID *is* the public key: base58 of the identity multihash of the libp2p `PublicKey`
message, `12D3KooW...`. So anyone verifies a signature with nothing but the ID. The file is the
libp2p `PrivateKey` message (`key_type=Ed25519, data = seed ‖ public key`), which p2pd accepts.
https://github.com/libp2p/specs/blob/master/peer-ids/peer-ids.md
"""

from __future__ import annotations

import hashlib
import os
import secrets
import threading
from functools import lru_cache
from typing import TYPE_CHECKING

import base58
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import (
    Ed25519PrivateKey,
    Ed25519PublicKey,
)

from dht.errors import LocalFault

if TYPE_CHECKING:
    from pathlib import Path

SIGNATURE_BYTES = 64
PEER_ID_CHARACTERS = 52  # base58 of the 38 bytes below, for every Ed25519 key
MAX_GENUINE = 8192  # signatures that are remembered to be genuine, oldest forgotten first
_SEED_BYTES = 32
_PUBLIC_KEY_BYTES = 32
_PRIVATE_PREFIX = bytes.fromhex("08011240")  # PrivateKey: key_type=Ed25519, data of 64 bytes
_PEER_ID_PREFIX = bytes.fromhex("002408011220")  # identity multihash of 36 bytes; PublicKey
_genuine: dict[bytes, None] = {}
_genuine_lock = threading.Lock()  # long chains are checked in threads


class Identity:
    """A private key in memory. It never prints itself."""

    def __init__(self, seed: bytes) -> None:
        self._key = Ed25519PrivateKey.from_private_bytes(seed)
        self._seed = seed
        self._public = self._key.public_key().public_bytes_raw()
        self.peer_id = _peer_id_of(self._public)

    @classmethod
    def load_or_create(cls, file: Path) -> Identity:
        """The identity kept in `file`, which is created (mode 0600) when there is none.

        Raises `LocalFault` if the file cannot be used; it is never overwritten.
        """
        try:
            return cls._load(file)
        except FileNotFoundError:
            pass
        try:
            identity = cls(secrets.token_bytes(_SEED_BYTES))
            identity._save(file)
            return identity
        except FileExistsError:  # another process of this peer was faster
            return cls._load(file)
        except OSError as e:
            raise LocalFault(
                f"cannot write the identity file `{file}`: {e.strerror}",
                hint="choose a directory that you may write to",
            ) from e

    @classmethod
    def _load(cls, file: Path) -> Identity:
        try:
            with file.open("rb") as stream:
                raw = stream.read(len(_PRIVATE_PREFIX) + _SEED_BYTES + _PUBLIC_KEY_BYTES + 1)
        except FileNotFoundError:
            raise
        except OSError as e:
            raise LocalFault(f"cannot read the identity file `{file}`: {e.strerror}") from e
        seed = raw[len(_PRIVATE_PREFIX) :][:_SEED_BYTES]
        if len(seed) != _SEED_BYTES or cls(seed).to_bytes() != raw:
            raise LocalFault(
                f"the identity file `{file}` is damaged or holds no Ed25519 key",
                hint="restore your copy of it, or move it away to start with a new identity",
            )
        return cls(seed)

    def to_bytes(self) -> bytes:
        """The libp2p `PrivateKey` message: the contents of the identity file. A secret."""
        return _PRIVATE_PREFIX + self._seed + self._public

    def _save(self, file: Path) -> None:
        """Write to a temporary file, then link it: the key appears whole or not at all.

        Some file systems (exFAT, SMB, FUSE) have no hard links. There it is written in place, never
        over another one; only a crash in the middle leaves a file that is refused.
        """
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f"{file.name}.{secrets.token_hex(4)}.tmp")
        try:
            self._write_new(temporary)
            try:
                os.link(temporary, file)  # unlike a rename it fails when the file exists
            except FileExistsError:
                raise
            except OSError:  # each file system says it with an error of its own
                self._write_new(file)
        finally:
            temporary.unlink(missing_ok=True)

    def _write_new(self, file: Path) -> None:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(self.to_bytes())
                stream.flush()
                os.fsync(stream.fileno())
        except BaseException:
            file.unlink(missing_ok=True)
            raise

    def sign(self, message: bytes) -> bytes:
        """The 64-byte Ed25519 signature of `message`."""
        return self._key.sign(message)

    def __repr__(self) -> str:
        return f"Identity({self.peer_id})"


def _peer_id_of(public_key: bytes) -> str:
    return base58.b58encode(_PEER_ID_PREFIX + public_key).decode()


@lru_cache(maxsize=4096)
def _verifier(peer_id: str) -> Ed25519PublicKey:
    return Ed25519PublicKey.from_public_bytes(public_key_of(peer_id))


@lru_cache(maxsize=4096)  # every message names peers, the same ones again and again
def public_key_of(peer_id: str) -> bytes:
    """The 32-byte Ed25519 public key that a peer ID embeds; ValueError if it embeds none."""
    if len(peer_id) != PEER_ID_CHARACTERS:
        raise ValueError(f"not the peer ID of an Ed25519 key: {peer_id[:64]!r}")
    raw = base58.b58decode(peer_id)
    if len(raw) != len(_PEER_ID_PREFIX) + _PUBLIC_KEY_BYTES or not raw.startswith(_PEER_ID_PREFIX):
        raise ValueError(f"not the peer ID of an Ed25519 key: {peer_id!r}")
    return raw[len(_PEER_ID_PREFIX) :]


def peer_id_bytes(peer_id: str) -> bytes:
    """The binary form of a peer ID (38 bytes); ValueError if it is not an Ed25519 key's."""
    return _PEER_ID_PREFIX + public_key_of(peer_id)


def verify(peer_id: str, message: bytes, signature: bytes) -> bool:
    """Whether `signature` is `peer_id`'s on `message`. Never raises, whatever the bytes.

    The same bytes come again and again (a commitment comes with each attempt of a round, in the
    proposal, the certificate, and the chain), so what was found genuine is remembered by a hash.
    """
    parts = (peer_id.encode(), signature, message)
    sizes = ":".join(str(len(part)) for part in parts)
    key = hashlib.sha256(b"".join((sizes.encode(), *parts))).digest()
    with _genuine_lock:
        if key in _genuine:
            return True
    try:
        _verifier(peer_id).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    with _genuine_lock:
        _genuine[key] = None
        if len(_genuine) > MAX_GENUINE:
            del _genuine[next(iter(_genuine))]
    return True
