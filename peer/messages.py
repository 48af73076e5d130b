"""What peers say to each other in a round: the wire types, in one place.

Every message is strict JSON with bounded fields, so that bytes from outside either are a message or
are a `BadMessage` of the peer that sent them. Signed ones carry a detached Ed25519 signature over a
domain tag and the message without its signature; the signer is named inside, and its peer ID is its
public key.
"""

import hashlib
from functools import cached_property
from typing import Annotated, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dht.errors import BadMessage
from dht.identity import Identity, verify
from dht.records import Digest, ModuleText, PathText, PeerIDText

PROTOCOL_VERSION = 2

# A certificate of 16 contributions and a roster of 32 is about 30 kB of JSON.
MAX_MESSAGE_BYTES = 256 * 1024
MAX_ROSTER = 64
MAX_REASON_CHARACTERS = 200
MAX_CONTRIBUTIONS = 64  # offered to one round
MAX_COUNTED = 16  # of these, or of merged ones, that one version is made of
MAX_KNOWN = 2 * MAX_CONTRIBUTIONS  # commitments to one round, with those that merge others
MAX_WAIT_SECONDS = 60.0  # that a leader may ask a member to take before it answers
MAX_TOKENS = 2**36  # of one contribution; sums of many stay numbers that JSON keeps exact

Version = Annotated[int, Field(ge=0, le=2**31)]
Slot = Annotated[int, Field(ge=0, le=2**31)]
Tokens = Annotated[int, Field(ge=1, le=MAX_TOKENS)]


class Message(BaseModel):
    """Base of all wire types: immutable, no unknown fields, no coercion between types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    def to_bytes(self) -> bytes:
        """Canonical JSON: fields in their declared order, no spaces."""
        return self.model_dump_json().encode()

    @classmethod
    def from_bytes(cls, raw: bytes, *, sender: str, max_bytes: int = MAX_MESSAGE_BYTES) -> Self:
        """Parse what `sender` sent; raises `BadMessage` naming it for anything but a message."""
        if len(raw) > max_bytes:
            raise BadMessage(sender, f"{cls.__name__} of {len(raw)} bytes, at most {max_bytes}")
        try:
            return cls.model_validate_json(raw)
        except (ValidationError, ValueError, RecursionError) as error:
            raise BadMessage(sender, f"not a {cls.__name__}") from error


class Hashed(Message):
    """A message that others refer to by its digest."""

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON, as hex."""
        return hashlib.sha256(self.to_bytes()).hexdigest()


class SignedMessage(Hashed):
    """A message that names its signer (`peer`) and carries that peer's signature."""

    peer: PeerIDText
    signature: str = Field(default="", pattern=r"^([0-9a-f]{128})?$")

    def signed_bytes(self) -> bytes:
        """What the signature covers: the type's name and version, then the rest of the message."""
        body = self.model_dump_json(exclude={"signature"})
        return f"dipaco/{type(self).__name__.lower()}/{PROTOCOL_VERSION}\n{body}".encode()

    @property
    def is_authentic(self) -> bool:
        """Whether `peer` signed exactly this."""
        return bool(self.signature) and verify(
            self.peer, self.signed_bytes(), bytes.fromhex(self.signature)
        )


S = TypeVar("S", bound=SignedMessage)


def sign(message: S, identity: Identity) -> S:
    """The same message with `identity`'s signature; the message must name that identity."""
    assert message.peer == identity.peer_id, "a peer signs only for itself"
    signature = identity.sign(message.signed_bytes()).hex()
    return message.model_copy(update={"signature": signature})


class Part(Message):
    """A contribution that has been averaged into a merged one."""

    peer: PeerIDText
    blob: Digest


class Commitment(SignedMessage):
    """A trainer's promise of one contribution: which bytes, to which version, of what weight.

    Sent to the module's group before anyone sees the bytes. The first for a (module, slot) counts.
    One with `merged` promises the average of what several peers of a path have committed to, its
    signer among them, instead of these; `tokens` are those of all.
    """

    run: Digest
    manifest: Digest  # the version in force in the slot, as the signer knows it
    module: ModuleText
    slot: Slot
    base_version: Version
    base_state: Digest  # digest of the module state that the outer gradient starts from
    path: PathText
    tokens: Tokens  # trained since that state
    blob: Digest
    blob_bytes: Annotated[int, Field(ge=1, le=2**40)]
    merged: Annotated[tuple[Part, ...], Field(max_length=MAX_CONTRIBUTIONS)] = ()

    @property
    def parts(self) -> tuple[Part, ...]:
        """Whose contributions this counts, and which."""
        return self.merged or (Part(peer=self.peer, blob=self.blob),)


class Seat(Message):
    """A place in a roster: a trainer of `path`, or a keeper (`path` is None)."""

    peer: PeerIDText
    path: PathText | None


class Ballot(Message):
    """One attempt to agree on a module's next version; ordered by slot, attempt, then leader."""

    slot: Slot
    attempt: Annotated[int, Field(ge=0, le=1000)]
    leader: PeerIDText

    @property
    def order(self) -> tuple[int, int, str]:
        """Sort key."""
        return (self.slot, self.attempt, self.leader)


class Proposal(Hashed):
    """What a leader asks the roster to make the module's next version."""

    run: Digest
    module: ModuleText
    version: Annotated[int, Field(ge=1, le=2**31)]
    parent: Digest  # digest of the certificate of version - 1; of the origin's state if none is
    contributions: Annotated[tuple[Commitment, ...], Field(min_length=1, max_length=MAX_COUNTED)]
    roster: Annotated[tuple[Seat, ...], Field(min_length=1, max_length=MAX_ROSTER)]
    rebuilt: bool  # the roster was taken from the announcements, not from the parent certificate
    next_roster: Annotated[tuple[Seat, ...], Field(min_length=1, max_length=MAX_ROSTER)]

    @property
    def quorum(self) -> int:
        """Votes needed: a strict majority of the roster."""
        return len(self.roster) // 2 + 1

    @property
    def slot(self) -> int:
        """The slot that its contributions were trained in."""
        return self.contributions[0].slot

    @property
    def manifest(self) -> str:
        """Digest of the manifest by which its contributions are weighed."""
        return self.contributions[0].manifest

    @property
    def contributors(self) -> list[str]:
        """Everyone who trained what is counted, those of merged contributions too."""
        found: list[str] = []
        for commitment in self.contributions:
            found += [part.peer for part in commitment.merged] or [commitment.peer]
        return found

    @property
    def tokens(self) -> int:
        """Tokens of all contributions."""
        return sum(contribution.tokens for contribution in self.contributions)


class Vote(SignedMessage):
    """A member's word that, reduced by itself, the proposal gives exactly the state `result`."""

    ballot: Ballot
    proposal: Digest
    result: Digest


class Certificate(Hashed):
    """Proof that a quorum of the roster computed the same state from the same contributions."""

    proposal: Proposal
    ballot: Ballot
    result: Digest
    votes: Annotated[tuple[Vote, ...], Field(min_length=1, max_length=MAX_ROSTER)]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of what is certified, as hex: of this without its ballot and votes.

        Two leaders may each gather votes for the same proposal; it is one version all the same.
        """
        body = self.model_dump_json(exclude={"ballot", "votes"})
        return hashlib.sha256(body.encode()).hexdigest()

    @property
    def module(self) -> str:
        """The module's name."""
        return self.proposal.module

    @property
    def version(self) -> int:
        """The version that this certifies."""
        return self.proposal.version


class HaveRequest(Message):
    """Leader to member: promise this ballot, and say which of these contributions you hold."""

    run: Digest
    module: ModuleText
    version: Version  # the version to be made
    parent: Digest
    ballot: Ballot
    commitments: Annotated[tuple[Commitment, ...], Field(max_length=MAX_CONTRIBUTIONS)]
    wait_seconds: Annotated[float, Field(ge=0, le=MAX_WAIT_SECONDS)]


class HaveReply(Message):
    """Member to leader: what it holds and knows, and what it already voted for, if anything."""

    promised: bool
    leaving: bool = False  # wants no seat in the next roster
    held: Annotated[tuple[Digest, ...], Field(max_length=MAX_KNOWN)]  # commitment digests
    commitments: Annotated[tuple[Commitment, ...], Field(max_length=MAX_KNOWN)]
    accepted: Proposal | None = None
    accepted_ballot: Ballot | None = None
    certificate: Certificate | None = None  # the member is already past this version


class ProposeRequest(Message):
    """Leader to member: reduce this and vote."""

    ballot: Ballot
    proposal: Proposal


class ProposeReply(Message):
    """Member to leader: its vote, or why not (a certificate if the version exists already)."""

    vote: Vote | None = None
    reason: Annotated[str, Field(max_length=MAX_REASON_CHARACTERS)] = ""
    certificate: Certificate | None = None


class CommitRequest(Message):
    """Trainer to member: its commitments of one slot, all modules at once."""

    commitments: Annotated[
        tuple[Commitment, ...], Field(min_length=1, max_length=MAX_CONTRIBUTIONS)
    ]


class CertifyRequest(Message):
    """Leader to member: the module has a new version."""

    certificate: Certificate


class ChainRequest(Message):
    """Asks a holder for a module's certificates with version >= `first_version`."""

    run: Digest
    module: ModuleText
    first_version: Version


class ChainReply(Message):
    """Consecutive certificates, oldest first; short of the newest when they would not fit."""

    certificates: Annotated[tuple[Certificate, ...], Field(max_length=256)]


class HandoverRequest(Message):
    """Asks whoever trained a path for what its optimizer has learnt of it."""

    run: Digest
    path: PathText


class HandoverReply(Message):
    """The state as a blob that the asked peer has; None if it has no such state."""

    blob: Digest | None


class HelloRequest(Message):
    """The first words between two peers: who is there, in which run, what time is it."""

    protocol: Annotated[int, Field(ge=0, le=2**31)]


class HelloReply(Message):
    """The answer: enough to find the manifest, or to say in one line why not."""

    protocol: Annotated[int, Field(ge=0, le=2**31)]
    run: Digest
    manifest: Digest  # the newest version
    now: Annotated[float, Field(ge=0, le=1e11, allow_inf_nan=False)]


class Done(Message):
    """Received."""
