"""A whole swarm in one process: the real peer code on the twins, under a virtual clock."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from contextvars import copy_context
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from bootstrap.operator import Operator, issue
from dht.memory import MemoryDHT, MemorySwarm
from dipaco.config import (
    RunConfig,
)
from dipaco.inner import PathTrainer
from dipaco.shards import Shard
from dipaco.start import Start
from dipaco.topology import PathID
from peer.blobs import BlobClient
from peer.events import EventLog
from peer.faults import Faults
from peer.history import History
from peer.keeper import Keeper
from peer.manifest import Manifest
from peer.memory import MemoryNetwork
from peer.modules import ModuleLog
from peer.node import Node
from peer.providers import Providers
from peer.store import BlobStore
from peer.training import Pace
from peer.volunteer import Volunteer
from tests.history_checker import read_histories
from tests.little_run import LabCorpus, identity, make_run, run_of
from tests.virtual_clock import OWNER

T = TypeVar("T")
STEP_SECONDS = 0.2  # of virtual time per call that a real peer would run in a thread


@dataclass(kw_only=True)
class LabPeer:
    """One running peer of a lab, with everything it has logged."""

    name: str
    keeper: Keeper
    volunteer: Volunteer | None
    events: list[dict[str, Any]]
    task: asyncio.Task[None] | None = None
    stack: AsyncExitStack = field(default_factory=AsyncExitStack)

    @property
    def peer_id(self) -> str:
        return self.keeper.node.peer_id

    def seen(self, event: str) -> list[dict[str, Any]]:
        return [entry for entry in self.events if entry["event"] == event]

    def versions(self) -> dict[str, int]:
        return {str(m): held.version for m, held in self.keeper.node.log.held.items()}


class Lab:
    """Starts, stops and kills peers; every peer runs the code that the real one runs."""

    def __init__(
        self,
        directory: Path,
        config: RunConfig,
        *,
        start_in: float = 10.0,
        seed: int = 0,
        prepared: Start | None = None,
    ) -> None:
        self.directory = directory
        self.dht = MemoryDHT(latency_seconds=0.01)
        self.network = MemoryNetwork(seed=seed)
        self.peers: dict[str, LabPeer] = {}
        self.numbers: dict[str, int] = {}
        self.batches: dict[str, list[int]] = {}  # trained, by path, in the order of time
        now = MemorySwarm(self.dht, identity(1)).now()
        if prepared is None:
            self.run = make_run(config, operator=identity(1), start_time=now + start_in)
        else:
            self.run = run_of(prepared, directory, start_time=now + start_in)

    async def bootstrap(self) -> LabPeer:
        """The first peer: has every blob, trains nothing, keeps everything."""
        peer = await self._start("bootstrap", 1, keep_all=True, trains=False)
        for raw in self.run.blobs:
            peer.keeper.node.store.add(raw)
        await peer.stack.enter_async_context(peer.keeper.running())
        return peer

    async def join(
        self, name: str, *, through: str = "bootstrap", step_seconds: float = 0.0
    ) -> LabPeer:
        """A volunteer; its state directory survives `kill`, so joining again is a restart.

        An inner step takes it `step_seconds` more than anything else that runs in a thread.
        Whatever it runs is its own in the eyes of `freeze` and `thaw` of the virtual clock.
        """
        context = copy_context()
        context.run(OWNER.set, name)
        joining = self._join(name, through=through, step_seconds=step_seconds)
        return await asyncio.create_task(joining, context=context)

    async def _join(self, name: str, *, through: str, step_seconds: float) -> LabPeer:
        number = self.numbers.setdefault(name, 2 + len(self.numbers))
        peer = await self._start(
            name, number, keep_all=False, trains=True, step_seconds=step_seconds
        )
        peer.keeper.providers.hints.append(self.peers[through].peer_id)
        await peer.stack.enter_async_context(peer.keeper.running())
        assert peer.volunteer is not None
        peer.task = asyncio.create_task(peer.volunteer.run())
        return peer

    async def issue(self, config: RunConfig) -> Manifest:
        """The operator gives the run its next manifest: `config`, on new shards."""
        keeper = self.peers["bootstrap"].keeper
        corpus = LabCorpus(keeper.node.store)
        draft = corpus.draft(keeper.node.history.newest, config, num_phases=0)
        manifest = issue(keeper.node, draft, identity(1))
        await keeper.presence.point_to_manifest()
        return manifest

    def operate(self) -> LabCorpus:
        """Let the operator do what there is to do, as its node does while it serves."""
        keeper = self.peers["bootstrap"].keeper
        corpus = LabCorpus(keeper.node.store)
        operator = Operator(keeper, corpus, identity=identity(1), directory=self.directory)
        keeper.background.start(operator.run(), "operator")
        return corpus

    async def leave(self, name: str) -> None:
        """What Ctrl-C does."""
        peer = self.peers[name]
        if peer.volunteer is not None and peer.task is not None:
            peer.volunteer.stop.set()
            await peer.task
        await peer.stack.aclose()
        self._forget(name)

    async def kill(self, name: str) -> None:
        """What SIGKILL does: nothing is said, nothing is saved."""
        peer = self.peers[name]
        self.network.crash(peer.peer_id)
        await peer.keeper.node.swarm.close()
        if peer.task is not None:
            peer.task.cancel()
            await asyncio.gather(peer.task, return_exceptions=True)
        member, blobs = peer.keeper.member, peer.keeper.node.blobs
        tasks = [
            *peer.keeper.background._tasks,
            *member.courier._tasks,
            *member.contributions._pulls.values(),
            *member._reducer._adding.values(),
            *(fetch.task for fetch in blobs._running.values()),
        ]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        peer.keeper.background.is_open = False
        peer.keeper.node.events.close()
        self._forget(name)

    def _forget(self, name: str) -> None:
        peer = self.peers.pop(name)
        self.network.transports.pop(peer.peer_id, None)

    async def until(self, condition: Callable[[], bool], *, within: float, what: str) -> None:
        """Wait (in virtual seconds) for something; fails naming it."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + within
        while not condition():
            for peer in self.peers.values():
                if peer.task is not None and peer.task.done():
                    peer.task.result()
            assert loop.time() < deadline, f"not within {within} s: {what}"
            await asyncio.sleep(0.25)

    async def until_versions(self, count: int, peers: Sequence[LabPeer], *, within: float) -> None:
        """Wait until these peers hold modules, all of at least that version."""
        await self.until(
            lambda: all(min(p.versions().values(), default=0) >= count for p in peers),
            within=within,
            what=f"version {count} of everything",
        )

    async def _start(
        self, name: str, number: int, *, keep_all: bool, trains: bool, step_seconds: float = 0.0
    ) -> LabPeer:
        state_dir = self.directory / name
        key = identity(number)
        swarm = MemorySwarm(self.dht, key)
        transport = self.network.transport(key.peer_id)
        events = EventLog(state_dir / "events.jsonl", swarm.now)
        logged: list[dict[str, Any]] = []
        events.listen(logged.append)
        store = BlobStore(state_dir / "blobs")
        faults = Faults(events)
        history = History(self.run.manifest, store, state_dir / "manifests")
        device = Device(step_seconds, self.batches)
        node = Node(
            identity=key,
            history=history,
            swarm=swarm,
            transport=transport,
            store=store,
            blobs=BlobClient(store, transport, faults),
            log=ModuleLog(state_dir / "modules", history, store),
            events=events,
            faults=faults,
            offload=device.offload,
            state_dir=state_dir,
        )
        keeper = Keeper(node, Providers(swarm, store, node.blobs), keep_all=keep_all)
        volunteer = None
        if trains:
            pace = Pace(burst_steps=1)
            volunteer = Volunteer(keeper, device.make_trainer, pace=pace)
        peer = LabPeer(name=name, keeper=keeper, volunteer=volunteer, events=logged)
        self.peers[name] = peer
        peer.stack.callback(events.close)
        peer.stack.push_async_callback(swarm.close)
        peer.stack.push_async_callback(transport.close)
        return peer


class Device:
    """What a real peer runs in a thread, run here, and charged to the virtual clock."""

    def __init__(self, step_seconds: float, batches: dict[str, list[int]]) -> None:
        self._step_seconds = step_seconds
        self._batches = batches
        self._num_steps = 0

    async def offload(self, function: Callable[[], T]) -> T:
        self._num_steps = 0
        result = function()
        await asyncio.sleep(STEP_SECONDS + self._num_steps * self._step_seconds)
        return result

    def make_trainer(self, manifest: Manifest, path: PathID, shard: Shard) -> PathTrainer:
        device = self

        class CountingTrainer(PathTrainer):
            def train_step(self, position_steps: int) -> Tensor:
                device._num_steps += 1
                device._batches.setdefault(str(self.path), []).append(self.next_batch_number)
                return super().train_step(position_steps)

        return CountingTrainer(manifest.run_config, manifest.topology, path, shard)


@asynccontextmanager
async def lab(directory: Path, config: RunConfig, **options: Any) -> AsyncIterator[Lab]:
    """A lab that ends in good order."""
    place = Lab(directory, config, **options)
    try:
        yield place
    except BaseException:
        for name in list(place.peers):
            await place.kill(name)
        raise
    for name in list(place.peers):
        await place.leave(name)
    assert read_histories(directory), "no peer has logged anything that could be checked"


def certified_states(peers: Sequence[LabPeer]) -> dict[tuple[str, int], set[str]]:
    """All states that any peer ever applied, by module and version: one each, if P1 holds."""
    states: dict[tuple[str, int], set[str]] = {}
    for peer in peers:
        for entry in [*peer.seen("version"), *peer.seen("caught up")]:
            states.setdefault((entry["module"], entry["version"]), set()).add(entry["state"])
    return states
