"""The modules that a peer holds, each a replicated log: a chain of certificates and one state.

On disk a module is a directory of certificates, one file per version, and the blob that the newest
one names. A state that a crash kept from being written, or that turns out truncated, is computed
again from the version before and the contributions, while these are here; else the newest
certificate with an intact state makes a version current.
"""

import math
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dht.errors import BadMessage, LocalFault, Unreachable
from dipaco.checkpoint import ModuleState, decode_state, state_bytes, write_atomically
from dipaco.digest import index_of
from dipaco.errors import BadState, DipacoError
from dipaco.model import num_parameters
from dipaco.topology import ModuleID, PathID
from peer.archive import WHOLE_KEPT, Archived, Link, shares, whole
from peer.history import History
from peer.manifest import Origin
from peer.messages import Certificate
from peer.reduction import mapped_gradient, reduce
from peer.store import BlobStore

MAX_RECENT_BYTES = 2**30  # of states kept in memory by default; one is, whatever its size
STATES_KEPT = 2  # the current version, and the one before it for whoever is about to catch up


@dataclass(slots=True)
class Held:
    """One module as this peer holds it."""

    module: ModuleID
    origin: Origin
    chain: list[Link] = field(default_factory=list)  # the versions after the origin's

    @property
    def certificate(self) -> Certificate | None:
        """The newest certificate; None at the origin."""
        return whole(self.chain[-1]) if self.chain else None

    @property
    def version(self) -> int:
        """The current version."""
        return self.origin.version + len(self.chain)

    @property
    def state(self) -> str:
        """Digest of the current state."""
        return self.chain[-1].result if self.chain else self.origin.state.digest

    @property
    def parent(self) -> str:
        """What the next certificate must name as its parent."""
        return self.chain[-1].digest if self.chain else self.origin.state.digest

    def up_to(self, version: int) -> list[Link]:
        """The certificates of all versions up to `version`, oldest first."""
        return self.chain[: max(0, version - self.origin.version)]

    def after(self, version: int) -> list[Link]:
        """The certificates of all versions later than `version`, oldest first."""
        return self.chain[max(0, version - self.origin.version) :]


def counted_tokens(
    certificates: Iterable[Link],
    path: PathID,
    *,
    first_slot: int = 0,
    before: float = math.inf,
) -> int:
    """Tokens of `path` that `certificates` count, of slots from one on and before another."""
    name = str(path)
    return sum(
        share.tokens
        for certificate in certificates
        for share in shares(certificate)
        if share.path == name and first_slot <= share.slot < before
    )


class ModuleLog:
    """All modules that this peer holds, in memory and on disk."""

    def __init__(self, directory: Path, history: History, store: BlobStore) -> None:
        self._directory = directory
        self._history = history
        self._store = store
        self.held: dict[ModuleID, Held] = {}  # in a thread, look through copies of it only
        self.max_recent_bytes = MAX_RECENT_BYTES
        self._recent: OrderedDict[str, ModuleState] = OrderedDict()
        self._recent_lock = threading.Lock()

    def num_parameters(self, module: ModuleID) -> int:
        """Length of the module's flat vector."""
        manifest = self._history.newest
        return num_parameters(manifest.run_config.model, manifest.topology, module)

    def open(self, module: ModuleID) -> Held | None:
        """What the disk has of `module`, to be held; None if that is no certified version of it.

        On any thread: what is held changes on the event loop only.
        """
        origin = self._history.origin(module)
        chain = self._read_chain(module, origin)
        held = Held(module=module, origin=origin, chain=list(chain))
        while (raw := self._store.read(held.state)) is None:
            if not held.chain:
                break
            held.chain.pop()
        else:
            self._take_again(held, raw, chain[len(held.chain) :])
            held.chain = self._archived(module, held.chain)
        for certificate in chain[len(held.chain) :]:
            self._certificate_file(module, certificate.version).unlink()
        # Of an origin the disk cannot tell whether it is still the newest.
        return held if held.chain else None

    def _take_again(self, held: Held, raw: bytes, missing: Iterable[Link]) -> None:
        """Compute states that are not here from `raw`, that of `held`, as far as that can be done.

        What comes out has the digest that the certificate names, or does not count.
        """
        num_parameters = self.num_parameters(held.module)
        try:
            for certificate in missing:
                proposal = certificate.proposal
                if (manifest := self._history.get(proposal.manifest)) is None:
                    return
                gradients = [
                    mapped_gradient(c, self._store, manifest, num_parameters=num_parameters)
                    for c in proposal.contributions
                ]
                for gradient in gradients:
                    gradient.check()
                before = decode_state(raw, num_parameters=num_parameters)
                raw = bytes(reduce(proposal, before, gradients, manifest).encoded)
                index = index_of(raw)
                if index.digest != certificate.result:
                    return
                self._store.put(index, raw)
                held.chain.append(certificate)
        except (DipacoError, Unreachable, LocalFault, OSError):  # a full disk, for one
            return

    def resumable(self) -> dict[ModuleID, list[Certificate]]:
        """The last certificates, oldest first, of every module that the disk has a state of.

        As many as there are states kept of each; without damaged ones, which `open` sees to.
        Changes nothing.
        """
        newest = {}
        for module in self._history.newest.topology.modules:
            certificates = []
            for file in sorted((self._directory / str(module)).glob("*.json"))[-STATES_KEPT:]:
                try:
                    certificates.append(Certificate.from_bytes(file.read_bytes(), sender="disk"))
                except (OSError, BadMessage):
                    continue
            if any(certificate.result in self._store for certificate in certificates):
                newest[module] = certificates
        return newest

    def versions_on_disk(self, module: ModuleID) -> list[tuple[int, str]]:
        """Every version of `module` that was held here, and the digest of its state, newest first.

        The states of old ones are no longer here. Changes nothing, unlike `open`.
        """
        origin = self._history.origin(module)
        chain = [(c.version, c.result) for c in self._read_chain(module, origin)]
        return [*reversed(chain), (origin.version, origin.state.digest)]

    def adopt(self, module: ModuleID, chain: Sequence[Link]) -> Held:
        """Make `chain` (checked, from the origin) this module's; its last state is here."""
        held = self.held.get(module)
        before = held.chain if held is not None else []
        new = Held(module=module, origin=self._history.origin(module), chain=list(chain))
        assert new.state in self._store, "a state is here first"
        for position, certificate in enumerate(chain):
            if position >= len(before) or before[position] is not certificate:
                file = self._certificate_file(module, certificate.version)
                write_atomically(file, whole(certificate).to_bytes())
        for certificate in before[len(chain) :]:
            self._certificate_file(module, certificate.version).unlink(missing_ok=True)
        new.chain = self._archived(module, chain)
        self.held[module] = new
        if held is not None and held.state != new.state:
            with self._recent_lock:
                self._recent.pop(held.state, None)  # its memory is that of the next version
        self._forget_states(before, new)
        return new

    def drop(self, module: ModuleID) -> None:
        """Hold this module no longer; its certificates stay, they are small."""
        held = self.held.pop(module, None)
        if held is not None:
            self._forget_states([*held.chain], None)

    def load_state(self, module: ModuleID) -> ModuleState:
        """The current state, from memory or verified from disk; `BadState` if it has rotted.

        States are shared: whoever gets one must not write into it.
        """
        digest = self.held[module].state
        state = self._recent.get(digest)
        if state is None:
            raw = self._store.read(digest)
            if raw is None:
                raise BadState(f"the state of module {module} is damaged on disk")
            state = decode_state(raw, num_parameters=self.num_parameters(module))
        self.remember(digest, state)
        return state

    def remember(self, digest: str, state: ModuleState) -> None:
        """Keep a state in memory, for the round that it begins."""
        with self._recent_lock:
            self._recent[digest] = state
            self._recent.move_to_end(digest)
            total_bytes = sum(state_bytes(s.num_parameters) for s in self._recent.values())
            evictable = [d for d in self._recent if d != digest]
            for oldest in evictable:
                if total_bytes <= self.max_recent_bytes:
                    break
                total_bytes -= state_bytes(self._recent.pop(oldest).num_parameters)

    def _forget_states(self, before: list[Link], new: Held | None) -> None:
        """Delete the states of versions that nobody will ask for; shared origins stay."""
        kept = {ref.digest for manifest in self._history.versions for ref in manifest.origins}
        for held in [*self.held.values(), *([new] if new else [])]:
            kept.update(certificate.result for certificate in held.chain[-STATES_KEPT:])
        candidates = [*before, *(new.chain if new else [])][-2 * STATES_KEPT - 2 :]
        for certificate in candidates:
            if certificate.result not in kept:
                self._store.remove(certificate.result)

    def _certificate_file(self, module: ModuleID, version: int) -> Path:
        directory = self._directory / str(module)
        directory.mkdir(parents=True, exist_ok=True)
        return directory / f"{version:08d}.json"

    def _archived(self, module: ModuleID, chain: Sequence[Link]) -> list[Link]:
        """`chain`, which is on the disk, with only the newest certificates whole."""
        return [
            *(
                Archived(old, self._certificate_file(module, old.version))
                if isinstance(old, Certificate)
                else old
                for old in chain[:-WHOLE_KEPT]
            ),
            *map(whole, chain[-WHOLE_KEPT:]),
        ]

    def _read_chain(self, module: ModuleID, origin: Origin) -> list[Link]:
        chain: list[Link] = []
        for file in sorted((self._directory / str(module)).glob("*.json")):
            try:
                certificate = Certificate.from_bytes(file.read_bytes(), sender="disk")
            except BadMessage:
                break  # damaged: the version before it is the current one
            parent = chain[-1].digest if chain else origin.state.digest
            if (certificate.version, certificate.proposal.parent) != (
                origin.version + len(chain) + 1,
                parent,
            ):
                break  # of another history, which this one was about to replace
            chain.append(certificate)
            if len(chain) > WHOLE_KEPT:  # one after another: all of them would take much memory
                chain[-WHOLE_KEPT - 1 :] = self._archived(module, chain[-WHOLE_KEPT - 1 :])
        return chain
