"""Addresses of the peers of a run, kept on disk: how a peer finds the others again by itself.

Nobody dials a bootstrap node that was away, and where it is gone no address on a command line
answers; but each of them has met others.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from dht.addresses import peer_of
from dht.errors import LocalFault
from dipaco.checkpoint import write_atomically

MAX_PEERS = 32
MAX_MADDRS = 2  # of each

Addresses = Mapping[str, Sequence[str]]
"""By peer ID."""


class AddressBook:
    """The addresses of some peers of a run. A file that cannot be read or written is none."""

    def __init__(self, file: Path, run: str = "") -> None:
        """The book in `file`, of whichever run it is; a new one of `run` if it is of another."""
        self._file = file
        self.run, self._addresses = _read(file)
        if run and run != self.run:
            self.run, self._addresses = run, {}

    @property
    def maddrs(self) -> list[str]:
        """All addresses, of those that were seen last first."""
        return [maddr for maddrs in self._addresses.values() for maddr in maddrs]

    def __contains__(self, peer: str) -> bool:
        return peer in self._addresses

    def note(self, seen: Addresses) -> None:
        """Remember where peers say that they are reached, as far as the addresses are theirs."""
        genuine = {peer: _own(peer, maddrs) for peer, maddrs in seen.items()}
        addresses = merged(self._addresses, {p: maddrs for p, maddrs in genuine.items() if maddrs})
        if addresses == self._addresses:
            return
        self._addresses = addresses
        text = json.dumps({"run": self.run, "peers": addresses}, indent=1)
        with suppress(OSError):  # once more when there is something new
            write_atomically(self._file, text.encode())


def merged(known: Addresses, seen: Addresses) -> dict[str, Sequence[str]]:
    """At most `MAX_PEERS`: of those known whoever is there still, newcomers, and then the others.

    In this order, so that many newcomers, who may all be one, do not drive out who has stayed.
    """
    stayed = {peer: seen[peer] for peer in known if peer in seen}
    ordered = {**stayed, **seen, **known, **seen}
    return dict(list(ordered.items())[:MAX_PEERS])


def _own(peer: str, maddrs: Sequence[str]) -> list[str]:
    own = []
    for maddr in maddrs[:MAX_MADDRS]:
        try:
            if peer_of(maddr) == peer:
                own.append(maddr)
        except LocalFault:
            continue
    return own


def _read(file: Path) -> tuple[str, dict[str, Sequence[str]]]:
    try:
        found = json.loads(file.read_text())
        peers: dict[str, Sequence[str]]
        peers = {p: own for p, maddrs in found["peers"].items() if (own := _own(p, maddrs))}
        return str(found["run"]), peers
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return "", {}
