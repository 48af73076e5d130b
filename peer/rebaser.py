"""New versions of a path's modules: prepared for beside training, put under the path between steps.

What is prepared for a version that is not held any more, because there is a later one or it has
lost a fork, is of no use.
"""

import asyncio
from collections.abc import Sequence
from functools import partial

from dipaco.topology import ModuleID
from peer.archive import Link, shares
from peer.node import Node
from peer.path_source import PathSource
from peer.path_work import PathWork, Rebasing
from peer.tally import Tally


class Rebaser:
    """Keeps the newest versions that are held under one path."""

    def __init__(self, node: Node, source: PathSource, work: PathWork, tally: Tally) -> None:
        self._node = node
        self._source = source
        self._work = work
        self._tally = tally
        self._rebasings: dict[ModuleID, asyncio.Task[Rebasing]] = {}

    async def apply(self, *, wait: bool) -> None:
        """Put every new version under the path.

        One that is still being prepared for comes later, unless the caller can `wait`.
        """
        node, work = self._node, self._work
        for module in work.trainer.modules:
            while work.is_new(module, (held := node.log.held[module]).version, held.state):
                if module not in self._rebasings:
                    self._rebasings[module] = asyncio.ensure_future(self._prepare(module))
                if not (wait or self._rebasings[module].done()):
                    break
                step = await self._rebasings.pop(module)
                if step.state != node.log.held[module].state:
                    continue
                with self._tally.instead("new versions"):
                    await node.offload(partial(work.rebase, step))

    def cancel(self) -> None:
        """Drop what is being prepared."""
        for task in self._rebasings.values():
            task.cancel()
        self._rebasings.clear()

    async def _prepare(self, module: ModuleID) -> Rebasing:
        node, work = self._node, self._work
        held = node.log.held[module]
        counted = _counted_blob(held.after(work.version(module)), node.peer_id)
        state = await self._source.state(module)
        return await node.offload(
            lambda: work.rebasing(module, held.version, held.state, state, counted=counted)
        )


def _counted_blob(certificates: Sequence[Link], peer: str) -> str | None:
    """The last contribution of `peer` that these certificates contain."""
    for certificate in reversed(certificates):
        if any(peer in share.peers for share in shares(certificate)):
            parts = (p for c in certificate.proposal.contributions for p in c.parts)
            return next(part.blob for part in parts if part.peer == peer)
    return None
