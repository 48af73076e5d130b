"""The one tree of errors. Its first branch is *ours or theirs*.

    SwarmError                  every error that the network side raises on purpose
    ├─ Unreachable              nobody answered in time            -> retry, with a limit
    │  ├─ Offline               our own p2pd is gone               -> wait: it is being replaced
    │  └─ NotYet                somebody has it, as it seems       -> wait, then ask again
    ├─ Rejected                 the swarm refused our record       -> re-read, then try again
    ├─ RunMismatch              another run, protocol or clock     -> stop, say what to do
    ├─ LocalFault               this machine cannot (p2pd, key)    -> stop, say what to do
    └─ PeerFault(peer_id, why)  *another* peer broke the rules     -> count it, ask another peer
       ├─ BadRecord             a record in the DHT
       ├─ BadBlob               bytes that do not match their digest or schema
       ├─ BadMessage            a frame or message of the wire
       └─ RemoteError           it answered with an error (`peer/transport.py`)

Bytes from another peer can only ever become a `PeerFault`.
"""

# ruff: noqa: N818 - the names say what happened, not that it is an error

from __future__ import annotations


class SwarmError(Exception):
    """The root. `hint` says what a person can do about it; it may be empty."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class Unreachable(SwarmError):
    """No answer in time: the dial failed, the stream was cut, or the deadline passed."""


class Offline(Unreachable):
    """Our own p2pd is gone, so nobody can be reached; whoever was asked is not at fault."""


class NotYet(Unreachable):
    """What is known to be somewhere cannot be had now; anything older would be of no use."""


class Rejected(SwarmError):
    """The swarm refused a record of ours: our clock, our state or our code is behind."""


class RunMismatch(SwarmError):
    """The other side runs another run, configuration, protocol or clock."""


class LocalFault(SwarmError):
    """This machine cannot do what it was asked to: a damaged key file, no p2pd, a taken port."""


class PeerFault(SwarmError):
    """Another peer broke the rules. This is data about `peer_id`, never fatal to us."""

    def __init__(self, peer_id: str, why: str) -> None:
        super().__init__(f"peer {peer_id}: {why}")
        self.peer_id = peer_id
        self.why = why


class BadRecord(PeerFault):
    """A record that is malformed, unsigned, misplaced, expired or lives too long."""


class BadBlob(PeerFault):
    """Bytes that do not match the digest or the schema they were asked for by."""


class BadMessage(PeerFault):
    """A frame or message that breaks the format or its size limit."""
