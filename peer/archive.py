"""Old certificates of a module that is held: on the disk, with little of them in memory.

One of 16 contributions takes 20 kB on the disk, 80 kB as objects, and 3 kB as this. Long runs have
thousands for each module, of which only the newest are needed whole, but for who asks for them.
"""

from dataclasses import dataclass
from pathlib import Path
from sys import intern

from dht.errors import BadMessage, LocalFault
from peer.messages import Ballot, Certificate, Proposal, Vote

WHOLE_KEPT = 8  # certificates of a module, the newest ones, that stay in memory as they are


@dataclass(frozen=True, slots=True)
class Share:
    """What stays of a commitment in memory."""

    path: str
    slot: int
    tokens: int
    peers: tuple[str, ...]  # whose contributions it counts


def shares_of(certificate: Certificate) -> tuple[Share, ...]:
    """One share per contribution."""
    return tuple(
        Share(
            path=intern(commitment.path),
            slot=commitment.slot,
            tokens=commitment.tokens,
            peers=tuple(intern(part.peer) for part in commitment.parts),
        )
        for commitment in certificate.proposal.contributions
    )


class Archived:
    """A certificate of which all that is asked for often is here, and the rest in `file`."""

    __slots__ = ("_file", "digest", "result", "shares", "version")

    def __init__(self, certificate: Certificate, file: Path) -> None:
        self.version = certificate.version
        self.digest = certificate.digest
        self.result = certificate.result
        self.shares = shares_of(certificate)
        self._file = file

    def whole(self) -> Certificate:
        """The certificate itself; `LocalFault` if the disk no longer has it."""
        try:
            certificate = Certificate.from_bytes(self._file.read_bytes(), sender="disk")
        except (OSError, BadMessage) as error:
            raise LocalFault(f"`{self._file}` is damaged") from error
        if certificate.digest != self.digest:
            raise LocalFault(f"`{self._file}` belongs to another history by now")
        return certificate

    @property
    def proposal(self) -> Proposal:
        """Read from the disk, like all below."""
        return self.whole().proposal

    @property
    def ballot(self) -> Ballot:
        """See `proposal`."""
        return self.whole().ballot

    @property
    def votes(self) -> tuple[Vote, ...]:
        """See `proposal`."""
        return self.whole().votes


Link = Certificate | Archived
"""One version of a module's history."""


def whole(link: Link) -> Certificate:
    """The certificate that a link is, or stands for."""
    return link.whole() if isinstance(link, Archived) else link


def shares(link: Link) -> tuple[Share, ...]:
    """What a version counts, without a look at the disk."""
    return link.shares if isinstance(link, Archived) else shares_of(link)
