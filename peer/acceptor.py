"""A member's memory of what it promised and voted for, on disk before anything is sent.

One module version is one decision of single-decree Paxos (Lamport, "Paxos Made Simple", 2001): the
`have` request is the prepare phase, the `propose` request the accept phase, the certificate the
learned value. A restarted member reads this file and so never votes twice in one ballot.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from dht.errors import BadMessage
from dht.records import ModuleText
from dipaco.checkpoint import write_atomically
from peer.messages import Ballot, Message, Proposal, Version


class Promise(Message):
    """What a member is bound to for one version of one module."""

    module: ModuleText
    version: Version
    parent: str  # a promise under another parent certificate is another decision
    promised: Ballot | None = None
    accepted_ballot: Ballot | None = None
    accepted: Proposal | None = None


MAX_PROMISE_BYTES = 512 * 1024


class Acceptor:
    """The promises of one peer, one file per module; read once, when it starts."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self._promises = {promise.module: promise for promise in _read(directory)}

    def state(self, module: str, version: int, parent: str) -> Promise:
        """What binds us for this decision; an older decision's promise no longer does.

        On any thread: it changes nothing.
        """
        promise = self._promises.get(module)
        if promise is not None and (promise.version, promise.parent) == (version, parent):
            return promise
        return Promise(module=module, version=version, parent=parent)

    def promise(self, module: str, version: int, parent: str, ballot: Ballot) -> bool:
        """Promise `ballot`, on disk; False if a later ballot was promised already."""
        state = self.state(module, version, parent)
        if state.promised is not None and ballot.order < state.promised.order:
            return False
        self._write(state.model_copy(update={"promised": ballot}))
        return True

    def accept(self, proposal: Proposal, ballot: Ballot) -> bool:
        """Bind us to `proposal` in `ballot`, on disk; False if a later ballot was promised."""
        state = self.state(proposal.module, proposal.version, proposal.parent)
        if state.promised is not None and ballot.order < state.promised.order:
            return False
        if state.accepted_ballot == ballot and state.accepted != proposal:
            return False  # a leader that proposes two things in one ballot gets one vote
        self._write(
            state.model_copy(
                update={"promised": ballot, "accepted_ballot": ballot, "accepted": proposal}
            )
        )
        return True

    def _write(self, promise: Promise) -> None:
        write_atomically(self._directory / f"{promise.module}.json", promise.to_bytes())
        self._promises[promise.module] = promise


def _read(directory: Path) -> Iterator[Promise]:
    for file in directory.glob("*.json"):
        with contextlib.suppress(BadMessage):  # flushed before a vote: only a failing disk garbles
            yield Promise.from_bytes(file.read_bytes(), sender="disk", max_bytes=MAX_PROMISE_BYTES)
