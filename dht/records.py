"""The records of the DHT: what they say, how they look on the wire, and when they are refused.

On the wire a record is `signature (64 bytes) ‖ payload`, where the payload is the JSON object of
one of the models below with its `kind`. The Ed25519 signature of the peer named in the record
covers the domain, the key, the subkey, the expiration time and the payload, each with its length.
The record itself determines its key (`Record.key`) and its subkey (`Record.peer`), so it cannot be
replayed anywhere else, and nobody but its owner can prolong it.

A record is taken back by storing it once more with `withdrawn` set and a later expiration time:
in a Kademlia DHT only what expires later replaces what is there.
"""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    TypeAdapter,
    ValidationError,
)

from dht.errors import BadRecord
from dht.identity import SIGNATURE_BYTES, Identity, public_key_of, verify
from dht.keys import announcement_key, head_key, manifest_key, provider_key, scores_key

MAX_RECORD_BYTES = 4096  # signature and payload
MAX_MADDRS = 4  # of a peer, by which others reach it
MAX_LIFETIME_SECONDS = 600.0
MAX_CLOCK_SKEW_SECONDS = 3.0  # as much as hivemind allows between any two clocks of a swarm
_DOMAIN = b"dipaco-record/1"


def _peer_id(text: str) -> str:
    public_key_of(text)
    return text


# The texts of all that peers say, in records and in messages.
RunID = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
Name = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f]{1,64}$")]
# Not every text that looks like a peer ID holds a key; a name that no one can have is no name.
PeerIDText = Annotated[
    str,
    StringConstraints(pattern=r"^12D3KooW[1-9A-HJ-NP-Za-km-z]{44}$"),
    AfterValidator(_peer_id),
]
PathText = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,6}(\.[0-9]{1,6}){0,15}$")]
ModuleText = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,4}\.[0-9]{1,6}$")]
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Maddr = Annotated[str, StringConstraints(pattern=r"^/[!-~]{1,255}$")]
Count = Annotated[int, Field(ge=0, lt=2**53)]  # the integers that every JSON reader keeps exact
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Nats = Annotated[float, Field(ge=0.0, le=1e15)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    peer: PeerIDText
    withdrawn: bool = False


class Announcement(_Record):
    """By which a peer says which path it trains, how far it is, and how it fares."""

    kind: Literal["announcement"] = "announcement"
    run: RunID
    path: PathText
    round: Count
    tokens: Count = 0  # that this peer trained, on any path
    slot_tokens: Count = 0  # that this peer trained in the last slot
    room_bytes: Count | None = None  # of memory for training; None if there is no limit
    commits: Count = 0  # certificates that hold a contribution of this peer
    inner_share: Share = 0.0  # of its wall time, spent in inner steps
    sent_bytes: Count = 0
    received_bytes: Count = 0
    valid_nll: Nats | None = None  # sum over `valid_tokens` of the path's validation part, nats
    valid_tokens: Count = 0
    maddrs: Annotated[tuple[Maddr, ...], Field(max_length=MAX_MADDRS)] = ()  # where it is reached

    @property
    def key(self) -> str:
        """Where it lies."""
        return announcement_key(self.run, self.path)


class Head(_Record):
    """By which a holder of a module names the newest version it has."""

    kind: Literal["head"] = "head"
    run: RunID
    module: ModuleText
    path: PathText | None = None  # that its holder trains; None if it only keeps the module
    leaving: bool = False  # it keeps the module until enough others do, and wants no seat
    version: Count
    certificate: Digest | Literal[""] = ""  # empty at the start, which the manifest certifies
    state: Digest
    path_tokens: Count = 0  # of a path-specific module: trained on its path's shard and counted

    @property
    def key(self) -> str:
        """Where it lies."""
        return head_key(self.run, self.module)


class Scores(_Record):
    """By which a peer that trains a path offers how well it predicts the router data."""

    kind: Literal["scores"] = "scores"
    run: RunID
    path: PathText
    phase: Count  # discriminative phases before this one
    blob: Digest

    @property
    def key(self) -> str:
        """Where it lies."""
        return scores_key(self.run, self.path)


class Provider(_Record):
    """By which a peer says that it has a whole blob."""

    kind: Literal["provider"] = "provider"
    digest: Digest

    @property
    def key(self) -> str:
        """Where it lies."""
        return provider_key(self.digest)


class ManifestPointer(_Record):
    """By which anyone points to the newest manifest; its own signature proves or refutes it."""

    kind: Literal["manifest"] = "manifest"
    run: RunID
    name: Name
    version: Count
    manifest: Digest

    @property
    def key(self) -> str:
        """Where it lies."""
        return manifest_key(self.run)


Record = Announcement | Head | Scores | Provider | ManifestPointer
_PAYLOAD: TypeAdapter[Record] = TypeAdapter(Annotated[Record, Field(discriminator="kind")])


def encode(record: Record, identity: Identity, expiration_time: float) -> bytes:
    """The wire form of `record`, signed until `expiration_time` (Unix seconds).

    Raises ValueError if it is too large or names another peer: both are faults of ours.
    """
    if record.peer != identity.peer_id:
        raise ValueError(f"{identity.peer_id} cannot sign a record of {record.peer}")
    payload = record.model_dump_json(exclude_defaults=False).encode()
    signature = identity.sign(_message(record.key, record.peer, expiration_time, payload))
    if len(signature) + len(payload) > MAX_RECORD_BYTES:
        raise ValueError(f"record of {len(payload)} bytes; the limit is {MAX_RECORD_BYTES}")
    return signature + payload


def decode(raw: bytes, *, key: str, subkey: str, expiration_time: float, now: float) -> Record:
    """The record in `raw`, if it is genuine, belongs under `key` and `subkey`, and is alive.

    Raises `BadRecord`, whatever the bytes are.
    """
    record = verified(raw, subkey, expiration_time)
    if record.key != key:
        raise BadRecord(subkey, f"a record of {record.key!r} lies under {key!r}")
    if not is_lifetime_allowed(expiration_time, now):
        raise BadRecord(subkey, f"expires more than {MAX_LIFETIME_SECONDS:.0f} s from now")
    if expiration_time <= now:
        raise BadRecord(subkey, "expired")
    return record


def is_lifetime_allowed(expiration_time: float, now: float) -> bool:
    """Whether a record that expires then is short-lived enough (false for a NaN)."""
    return expiration_time <= now + MAX_LIFETIME_SECONDS + MAX_CLOCK_SKEW_SECONDS


@lru_cache(maxsize=2048)  # at most 8 MiB: a reader meets one record at each of its replicas
def verified(raw: bytes, subkey: str, expiration_time: float) -> Record:
    """The record in `raw` if `subkey` signed it until `expiration_time`; else `BadRecord`.

    The caller compares the key and the clock.
    """
    if not SIGNATURE_BYTES < len(raw) <= MAX_RECORD_BYTES:
        raise BadRecord(subkey, f"a record of {len(raw)} bytes")
    signature, payload = raw[:SIGNATURE_BYTES], raw[SIGNATURE_BYTES:]
    try:
        record = _PAYLOAD.validate_json(payload)
    except ValidationError as e:
        problem = e.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(part)[:32] for part in problem["loc"])
        raise BadRecord(subkey, f"malformed record: {where} {problem['msg'][:80]}") from e
    if record.peer != subkey:
        raise BadRecord(subkey, f"a record of {record.peer} under another peer's subkey")
    if not verify(subkey, _message(record.key, subkey, expiration_time, payload), signature):
        raise BadRecord(subkey, "the signature does not match")
    return record


def _message(key: str, subkey: str, expiration_time: float, payload: bytes) -> bytes:
    """What is signed: each part with its length, so that no two records share a message."""
    parts = (_DOMAIN, key.encode(), subkey.encode(), struct.pack(">d", expiration_time), payload)
    return b"".join(struct.pack(">I", len(part)) + part for part in parts)
