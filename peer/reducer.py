"""What a proposal makes of a module: have its contributions, add them up, keep what comes out.

Nobody is believed for that: who votes, and who applies a certificate, has computed the same state.
It is in the store at once, in memory; only what is certified is written to the disk.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dht.errors import LocalFault, Unreachable
from dipaco.digest import BlobIndex, index_of
from dipaco.errors import BadState
from dipaco.outer import OuterUpdate
from dipaco.topology import ModuleID
from peer.contributions import Contributions
from peer.messages import Proposal
from peer.modules import Held
from peer.node import Node
from peer.reduction import reduce

OBTAIN_TIMEOUT_SECONDS = 60.0  # and a slot at most: then a later version is nearer than this one


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What a proposal makes of a module."""

    index: BlobIndex
    update: OuterUpdate

    @property
    def state(self) -> str:
        """Digest of the new state."""
        return self.index.digest


class Reducer:
    """Reduces proposals, one at a time of each module; remembers the last result of each."""

    def __init__(
        self,
        node: Node,
        contributions: Contributions,
        *,
        on_behind: Callable[[ModuleID], None],
    ) -> None:
        self._node = node
        self._contributions = contributions
        self._on_behind = on_behind
        self._results: dict[ModuleID, tuple[str, Result]] = {}  # of the proposal of that digest
        self._flushes: dict[str, asyncio.Task[None]] = {}  # of states that are not on disk yet
        self._locks: dict[ModuleID, asyncio.Lock] = {}
        self._adding: dict[ModuleID, asyncio.Task[Result | None]] = {}  # one at a time of each

    async def reduce(
        self, module: ModuleID, proposal: Proposal, *, sources: Sequence[str]
    ) -> Result | None:
        """Reduce a proposal by ourselves; the new state then is in the store.

        What is missing is pulled from its signers, `sources` and the roster. None if that cannot be
        done, or the module has gone on meanwhile. What is being added up goes on when whoever waits
        for it is cancelled: no vote is wanted any more, but what it is to be for is certified.
        """
        log = self._node.log
        async with self._locks.setdefault(module, asyncio.Lock()):
            if (left := self._adding.get(module)) is not None:
                await asyncio.wait({left})
            held = log.held.get(module)
            if held is None or held.parent != proposal.parent:
                return None
            known, result = self._results.get(module, ("", None))
            if known == proposal.digest:
                return result
            seats = [seat.peer for seat in proposal.roster]
            slot_seconds = self._node.history.first.run_config.rounds.round_seconds
            if not await self._contributions.obtain(
                proposal.contributions,
                [*sources, *seats],
                min(OBTAIN_TIMEOUT_SECONDS, slot_seconds),
            ):
                return None
            adding = asyncio.ensure_future(self._add_up_and_keep(module, held, proposal))
            self._adding[module] = adding
            adding.add_done_callback(lambda _: self._added(module))
            return await asyncio.shield(adding)

    def settle(self, module: ModuleID, state: str) -> OuterUpdate | None:
        """Keep of what was made of a module only `state`, which is certified now.

        Returns how it was made, if that was here.
        """
        _, result = self._results.get(module, ("", None))
        self._forget_result(module, but=state)
        return result.update if result is not None and result.state == state else None

    def write(self, state: str) -> None:
        """Begin to write a state to the disk; OSErrors are logged."""
        if state not in self._flushes:
            self._flushes[state] = asyncio.ensure_future(self._flush(state))

    async def written(self, state: str) -> None:
        """Return once a state is not being written any more."""
        if (flush := self._flushes.get(state)) is not None:
            await asyncio.wait({flush})

    async def close(self) -> None:
        """What is being written gets there; what is being added up ends, as threads do."""
        under_way = [*self._adding.values(), *self._flushes.values()]
        await asyncio.gather(*under_way, return_exceptions=True)

    async def _add_up_and_keep(
        self, module: ModuleID, held: Held, proposal: Proposal
    ) -> Result | None:
        node = self._node
        node.events.write(
            "reducing",
            module=proposal.module,
            version=proposal.version,
            slot=proposal.slot,
            proposal=proposal.digest,
        )
        try:
            result = await node.offload(lambda: self._add_up(module, proposal))
        except BadState:
            self._on_behind(module)
            return None
        except Unreachable:  # a blob rotted on disk since it was checked
            return None
        if node.log.held.get(module) is not held:
            return None  # it may have been reduced from another version
        return result if self._keep(module, proposal.digest, result) else None

    def _added(self, module: ModuleID) -> None:
        """Write down an error, too: whoever waited may be gone."""
        adding = self._adding.pop(module)
        if not adding.cancelled() and (error := adding.exception()) is not None:
            self._node.events.write("error", where="new state", why=repr(error))

    def _add_up(self, module: ModuleID, proposal: Proposal) -> Result:
        node = self._node
        manifest = node.history.get(proposal.manifest)
        assert manifest is not None, "contributions are pulled only under a manifest that is here"
        gradients = [self._contributions.gradient(c) for c in proposal.contributions]
        update = reduce(proposal, node.log.load_state(module), gradients, manifest)
        return Result(index=index_of(update.encoded), update=update)

    def _keep(self, module: ModuleID, proposal: str, result: Result) -> bool:
        """Have what a proposal comes to in the store, in memory until it is certified."""
        node = self._node
        self._forget_result(module, but=result.state)
        try:
            node.store.hold(result.index, result.update.encoded)
        except LocalFault as error:  # at its limit
            node.events.write("error", where="new state", why=str(error))
            return False
        node.log.remember(result.state, result.update.state)
        self._results[module] = (proposal, result)
        return True

    def _forget_result(self, module: ModuleID, *, but: str) -> None:
        """Drop the state that an earlier proposal would have made, unless it is `but`."""
        _, before = self._results.pop(module, ("", None))
        if before is not None and before.state != but:
            self._node.store.remove(before.state)

    async def _flush(self, state: str) -> None:
        node = self._node
        try:
            await node.offload(lambda: node.store.flush(state))
        except OSError as error:
            node.events.write("error", where="new state", why=str(error))
        finally:
            del self._flushes[state]
