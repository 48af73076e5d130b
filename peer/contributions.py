"""The contributions that a member knows of: commitments, and which of their bytes it holds.

The first commitment of a peer for a (module, slot) counts; a second, different one is evidence
against its signer. One that was made under another manifest than the one in force in its slot is
left aside: its signer has not heard of a later version, or we have not. Bytes are pulled as soon as
a commitment arrives, and are counted as held only after their size, digest, schema and values were
checked. They stay on disk, and are mapped into memory: adding them up reads them part by part.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import contextmanager

from dht.errors import BadMessage, LocalFault, PeerFault, SwarmError
from dipaco.compression import EncodedGradient, encoded_bytes
from dipaco.errors import BadContribution, DipacoError
from dipaco.topology import ModuleID, PathID
from peer.certificate import contribution_order
from peer.changes import Changes
from peer.manifest import Manifest
from peer.messages import MAX_CONTRIBUTIONS, MAX_COUNTED, Commitment, Seat
from peer.modules import Held
from peer.node import Node
from peer.reduction import format_of, mapped_gradient

SLOTS_KEPT = 2  # older commitments are forgotten, and their blobs deleted
MAX_PULLS = 8  # contributions pulled at once, of those that were only offered
MAX_URGENT_PULLS = MAX_COUNTED  # and of those that a leader asks for, or that we need
MAX_PULLS_OF_ONE = 2  # of each, from one signer: a silent one holds its places for a minute
# Far more than any training does, and so little that no state made of such overflows a float32.
MAX_NORM = 1e15


class Contributions:
    """Commitments of the last slots, by module and slot."""

    def __init__(
        self, node: Node, changes: Changes, *, on_manifest: Callable[[str, str], None]
    ) -> None:
        self._node = node
        self._changes = changes
        self._on_manifest = on_manifest
        # By module and slot, then by signer and whether it is a merged one.
        self._known: dict[tuple[str, int], dict[tuple[str, bool], Commitment]] = {}
        self._gradients: dict[str, EncodedGradient] = {}  # by digest of the commitment
        self._pulls: dict[str, asyncio.Task[None]] = {}
        self._brought: dict[str, int] = {}  # blobs that are here as contributions, and their size
        self._needed: Counter[str] = Counter()  # digests of commitments that `obtain` waits for
        self._logged: set[tuple[str, int]] = set()  # whose first pull is in the event log
        self._urgent: set[str] = set()  # digests of what is asked for or needed, and not here
        # The signers of what is being pulled, by whether that was urgent when it began.
        self._under_way: dict[bool, list[str]] = {False: [], True: []}

    def known(self, module: ModuleID, slot: int) -> list[Commitment]:
        """All commitments for a module and slot, in the order in which they are added up."""
        return sorted(self._known.get((str(module), slot), {}).values(), key=contribution_order)

    def usable(self, commitments: Iterable[Commitment], held: Held, slot: int) -> list[Commitment]:
        """Those of `slot` that the version after `held` may count.

        No proposal with another one is valid, so it has a place in none, and nobody waits for it.
        """
        manifest = self._node.history.at(slot).digest
        right = (str(held.module), held.version, held.state, manifest, slot)
        return [
            c
            for c in commitments
            if (c.module, c.base_version, c.base_state, c.manifest, c.slot) == right
        ]

    def held(self, commitments: Iterable[Commitment]) -> list[Commitment]:
        """Those whose bytes are here and were found good."""
        return [commitment for commitment in commitments if commitment.digest in self._gradients]

    def gradient(self, commitment: Commitment) -> EncodedGradient:
        """The outer gradient of a commitment whose blob is here; raises as `open`."""
        return self._gradients.get(commitment.digest) or self.open(commitment)

    def add(self, commitment: Commitment, *, sender: str, is_asked_for: bool) -> bool:
        """Check a commitment, remember it, and begin to pull its bytes.

        False if it was made under another manifest than the one in force in its slot, or is a
        merged one of which a version's worth is here already. Raises `BadMessage` naming the sender
        if it is not what its signer could rightly send. Of more commitments than a round counts,
        only merged ones are pulled, and those that a leader asks for.
        """
        if abs(commitment.slot - self._node.slot) > SLOTS_KEPT:
            raise BadMessage(sender, "commitment for a slot long past or far ahead")
        manifest = self._checked(commitment, sender)
        if manifest is None or manifest is not self._node.history.at(commitment.slot):
            return False
        known = self._known.setdefault((commitment.module, commitment.slot), {})
        key = commitment.peer, bool(commitment.merged)
        first = known.get(key)
        if first is not None and first != commitment:
            raise BadMessage(
                commitment.peer, "committed twice, differently, to one module and slot"
            )
        if first is None:
            num_alike = sum(merged == key[1] for _, merged in known)
            if commitment.merged and num_alike >= MAX_COUNTED:
                return False  # no version counts more; and all that is known fits one message
            if num_alike >= MAX_CONTRIBUTIONS and not self._make_room(commitment, known):
                raise BadMessage(sender, "more commitments than a round can hold")
            check_parts(commitment, known)
            known[key] = commitment
            self._give_up_before(commitment)
            self._changes.notify()
        if is_asked_for or commitment.merged or not self._is_crowded(commitment):
            sources = [commitment.peer, sender, *self._group(commitment)]
            self._pull(commitment, sources, is_urgent=is_asked_for)
        return True

    def _make_room(self, commitment: Commitment, known: dict[tuple[str, bool], Commitment]) -> bool:
        """Whether a stranger's commitment, without bytes so far, has given way to a seated peer's.

        Keys cost nothing, so whoever has many could else be first with all that a round can hold.
        """
        seated = {seat.peer for seat in self._seats(commitment)}
        if commitment.peer not in seated:
            return False
        for key, other in known.items():
            is_rival = key[1] == bool(commitment.merged) and other.peer not in seated
            if is_rival and other.digest not in self._gradients:
                del known[key]
                if other.digest in self._pulls:
                    self._pulls[other.digest].cancel()
                return True
        return False

    def _give_up_before(self, commitment: Commitment) -> None:
        """Stop pulling what the same peer offered in earlier slots: it is in the new one, too.

        On a slow line they would be in each other's way. What was agreed on meanwhile is needed.
        """
        key = commitment.peer, bool(commitment.merged)
        for (module, slot), known in self._known.items():
            if module == commitment.module and slot < commitment.slot and key in known:
                digest = known[key].digest
                if digest in self._pulls and digest not in self._needed:
                    self._pulls[digest].cancel()

    def _group(self, commitment: Commitment) -> list[str]:
        """Who pulls the same bytes, so that a slow uplink sends them about once."""
        return [seat.peer for seat in self._seats(commitment)]

    def _is_crowded(self, commitment: Commitment) -> bool:
        """Whether more contribute, or are expected to, than a version counts.

        What cannot be counted is in the way of others of its kind only, and who has no seat in that
        of nobody who has one.
        """
        module, slot = ModuleID.parse(commitment.module), commitment.slot
        rivals = self.known(module, slot)
        if (held := self._node.log.held.get(module)) is not None:
            usable = self.usable(rivals, held, slot)
            rivals = usable if commitment in usable else rivals
        seats = self._seats(commitment)
        if commitment.peer in (seated := {seat.peer for seat in seats}):
            rivals = [rival for rival in rivals if rival.peer in seated]
        num_trainers = sum(seat.path is not None for seat in seats)
        return max(len(rivals), num_trainers) > MAX_COUNTED

    def _seats(self, commitment: Commitment) -> tuple[Seat, ...]:
        held = self._node.log.held.get(ModuleID.parse(commitment.module))
        certificate = held.certificate if held is not None else None
        return certificate.proposal.next_roster if certificate else ()

    def add_own(self, commitment: Commitment, gradient: EncodedGradient) -> None:
        """Remember our own contribution, whose blob is in the store."""
        known = self._known.setdefault((commitment.module, commitment.slot), {})
        known[commitment.peer, bool(commitment.merged)] = commitment
        self._brought[commitment.blob] = commitment.blob_bytes
        self._gradients[commitment.digest] = gradient
        self._changes.notify()

    def open(self, commitment: Commitment) -> EncodedGradient:
        """Map the blob of a commitment. Raises `BadContribution` if it is not an outer gradient of
        its module, `Unreachable` if it is not here.
        """
        node = self._node
        manifest = node.history.get(commitment.manifest)
        assert manifest is not None, "bytes are pulled only under a manifest that is here"
        num_parameters = node.log.num_parameters(ModuleID.parse(commitment.module))
        return mapped_gradient(commitment, node.store, manifest, num_parameters=num_parameters)

    async def obtain(
        self, commitments: Iterable[Commitment], sources: Iterable[str], timeout_seconds: float
    ) -> bool:
        """Have the bytes of all `commitments`, pulling what is missing; False if that fails.

        However old: what somebody voted for is proposed again until there is a certificate.
        """
        wanted = list(commitments)
        for commitment in wanted:
            if self._checked(commitment, commitment.peer) is None:
                return False
            self._pull(commitment, [commitment.peer, *sources], is_urgent=True)
        needed = Counter(commitment.digest for commitment in wanted)
        self._needed += needed
        try:
            return await self._changes.until(
                lambda: (
                    len(self.held(wanted)) == len(wanted)
                    or not any(
                        c.digest in self._pulls for c in wanted if c.digest not in self._gradients
                    )
                ),
                timeout_seconds,
            ) and len(self.held(wanted)) == len(wanted)
        finally:
            self._needed -= needed

    def forget_before(self, slot: int, *, kept: Set[str]) -> None:
        """Drop what no round will ask for any more, but for the `kept` blobs."""
        gone: set[str] = set()
        for key in [key for key in self._known if key[1] < slot - SLOTS_KEPT]:
            for commitment in self._known.pop(key).values():
                gone.add(commitment.blob)
                if commitment.digest in self._pulls:
                    self._pulls[commitment.digest].cancel()
        known = list(self._all_known())
        digests = {commitment.digest for commitment in known}
        self._gradients = {d: g for d, g in self._gradients.items() if d in digests}
        # What was not counted may have been offered again, with the same bytes.
        for blob in gone.difference(kept, (commitment.blob for commitment in known)):
            self._remove(blob)
        self._logged = {key for key in self._logged if key[1] >= slot - SLOTS_KEPT}

    async def close(self) -> None:
        """Give up all pulls."""
        for task in list(self._pulls.values()):
            task.cancel()
        await asyncio.gather(*self._pulls.values(), return_exceptions=True)

    def _checked(self, commitment: Commitment, sender: str) -> Manifest | None:
        """The manifest that a sound commitment was made under.

        None if that is not known here: then it is searched for.
        """
        node = self._node
        if commitment.run != node.run:
            raise BadMessage(sender, "commitment to another run")
        if not commitment.is_authentic:
            raise BadMessage(sender, "forged commitment")
        manifest = node.history.get(commitment.manifest)
        if manifest is None:
            self._on_manifest(commitment.manifest, sender)
            return None
        try:
            module, path = ModuleID.parse(commitment.module), PathID.parse(commitment.path)
            on_path = module in manifest.topology.modules_of(path)
        except (ValueError, LookupError) as error:
            raise BadMessage(
                sender, "commitment to a module or path that does not exist"
            ) from error
        wire_format = format_of(commitment, manifest)
        size = encoded_bytes(wire_format, node.log.num_parameters(module)) if on_path else 0
        if commitment.blob_bytes != size:
            raise BadMessage(sender, "commitment that does not fit the run")
        return manifest

    def _all_known(self) -> Iterator[Commitment]:
        return (c for known in self._known.values() for c in known.values())

    def _pull(self, commitment: Commitment, sources: list[str], *, is_urgent: bool) -> None:
        if commitment.digest in self._gradients:
            return
        if is_urgent and commitment.digest not in self._urgent:
            self._urgent.add(commitment.digest)
            self._changes.notify()
        if commitment.digest in self._pulls:
            return
        task = asyncio.ensure_future(self._fetch_and_check(commitment, sources))
        self._pulls[commitment.digest] = task
        task.add_done_callback(lambda _: self._pulled(commitment))

    def _pulled(self, commitment: Commitment) -> None:
        self._pulls.pop(commitment.digest, None)
        self._urgent.discard(commitment.digest)
        self._changes.notify()

    def _may_begin(self, commitment: Commitment) -> bool:
        """Whether few enough are being pulled.

        What was only offered is in the way of nothing urgent, and no signer in that of all others.
        """
        is_urgent = commitment.digest in self._urgent
        signers = self._under_way[is_urgent]
        is_full = len(signers) >= (MAX_URGENT_PULLS if is_urgent else MAX_PULLS)
        return not is_full and signers.count(commitment.peer) < MAX_PULLS_OF_ONE

    @contextmanager
    def _place(self, commitment: Commitment) -> Iterator[None]:
        """A place among what is being pulled."""
        signers = self._under_way[commitment.digest in self._urgent]
        signers.append(commitment.peer)
        try:
            yield
        finally:
            signers.remove(commitment.peer)
            self._changes.notify()

    async def _fetch_and_check(self, commitment: Commitment, sources: list[str]) -> None:
        node = self._node
        slot_seconds = node.history.first.run_config.rounds.round_seconds
        # After so long it is forgotten, unless somebody needs it: who does asks again.
        wait_seconds = SLOTS_KEPT * slot_seconds
        if not await self._changes.until(lambda: self._may_begin(commitment), wait_seconds):
            return
        try:
            with self._place(commitment):
                self._log_first(commitment)
                if commitment.blob not in node.store:
                    self._brought[commitment.blob] = commitment.blob_bytes
                await node.blobs.fetch(commitment.blob, sources, max_bytes=commitment.blob_bytes)
            self._gradients[commitment.digest] = await node.offload(
                lambda: self._checked_gradient(commitment)
            )
        except DipacoError as error:
            if not any(c.blob == commitment.blob for c in self.held(self._all_known())):
                self._remove(commitment.blob)
            node.faults.count(PeerFault(commitment.peer, str(error)), commitment.peer)
        except LocalFault as error:  # our disk: nothing that the signer could help
            node.events.write("error", where="contribution", why=str(error))
        except SwarmError as error:
            node.faults.count(error, commitment.peer)

    def _remove(self, blob: str) -> None:
        """Delete what came as a contribution, and has the size of one.

        Not what a commitment names that is here, or was on its way, for another reason, such as the
        module's state.
        """
        size, index = self._brought.pop(blob, None), self._node.store.index(blob)
        if size is not None and (index is None or index.size == size):
            self._node.store.remove(blob)

    def _checked_gradient(self, commitment: Commitment) -> EncodedGradient:
        """Raises `BadContribution` unless the blob is a vector of the module's length, and of one
        that training can have.
        """
        gradient = self.open(commitment)
        gradient.check()
        if gradient.norm > MAX_NORM:
            raise BadContribution(f"an outer gradient of norm {gradient.norm:.0e}")
        return gradient

    def _log_first(self, commitment: Commitment) -> None:
        """One line per module and slot, however many contributions there are."""
        key = (commitment.module, commitment.slot)
        if key not in self._logged:
            self._logged.add(key)
            self._node.events.write("pulling", module=commitment.module, slot=commitment.slot)


def check_parts(commitment: Commitment, known: Mapping[tuple[str, bool], Commitment]) -> None:
    """Raise `BadMessage` if a merged commitment contradicts itself, or what is `known` here.

    What it is the average of is not checked: that only who has all parts could.
    """
    if not commitment.merged:
        return
    peers = {part.peer for part in commitment.merged}
    parts = [(part, known.get((part.peer, False))) for part in commitment.merged]
    if commitment.peer not in peers or not 1 < len(peers) == len(parts):
        raise BadMessage(commitment.peer, "merged what it may not")
    for part, single in parts:
        if single is not None and (single.blob, single.path, single.base_state) != (
            part.blob,
            commitment.path,
            commitment.base_state,
        ):
            raise BadMessage(commitment.peer, "merged what nobody has committed to")
    singles = [single for _, single in parts if single is not None]
    tokens = sum(single.tokens for single in singles)
    if tokens > commitment.tokens or (len(singles) == len(parts) and tokens != commitment.tokens):
        raise BadMessage(commitment.peer, "merged another number of tokens")
