"""A swarm that peers keep leaving, by SIGKILL or Ctrl-C, and coming back to; what came of it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from dht.memory import now
from dipaco.config import RunConfig
from dipaco.evaluate import NOTHING, evaluate
from dipaco.model import PathNet, write_module
from dipaco.start import Start
from dipaco.topology import ModuleID, PathID
from peer.messages import Certificate
from tests.history_checker import check, read_histories
from tests.lab import Lab, LabPeer, lab

ABSENCE_ROUNDS = 0.5  # mean time until a peer comes back, or another one in its place


@dataclass(frozen=True, kw_only=True)
class Churn:
    """How long peers stay: exponentially distributed, half of them are killed in the end."""

    num_peers: int
    num_slots: int
    lifetime_rounds: float | None = 4.0  # mean; None: everyone stays
    step_seconds: float = 2.0  # of virtual time; some 8 steps fit in a slot of 20 s
    max_tokens: float = float("inf")  # counted; the run ends when they are reached
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What is left of a run.

    `curve`: counted tokens and the perplexity of the whole model, after each slot.
    `committed` of `possible` slots of modules that were trained while a majority of the roster
    was there throughout the round.
    """

    curve: Sequence[tuple[int, float]]
    num_killed: int
    num_left: int
    possible: int
    committed: int
    missed: Sequence[str]
    violations: Sequence[str]


class Soak:
    """One run with churn, under a virtual clock."""

    def __init__(self, place: Lab, churn: Churn) -> None:
        self._place = place
        self._config = place.run.manifest.run_config
        self._topology = place.run.manifest.topology
        self._churn = churn
        self._random = random.Random(churn.seed)
        self._round_seconds = self._config.rounds.round_seconds
        self._lives: list[tuple[str, float, float | None]] = []  # peer, since, until (Unix seconds)
        self._trained: dict[int, set[ModuleID]] = {}  # modules contributed to, by slot
        self._num = {"kill": 0, "leave": 0}
        self._endings: list[asyncio.Future[None]] = []
        self._num_names = 0
        self._tasks: list[asyncio.Task[None]] = []
        self._net = PathNet(self._config.model)

    async def run(self) -> Outcome:
        place, churn = self._place, self._churn
        bootstrap = await place.bootstrap()
        self._note_life(bootstrap)
        self._tasks = [asyncio.create_task(self._seat()) for _ in range(churn.num_peers)]
        curve: list[tuple[int, float]] = []
        try:
            while len(curve) < churn.num_slots and (not curve or curve[-1][0] < churn.max_tokens):
                # All attempts of a slot are over when three quarters of the next one are.
                slot = len(curve) + 1.8
                await asyncio.sleep(
                    place.run.manifest.slot_start(0) + slot * self._round_seconds - now()
                )
                for task in self._tasks:
                    if task.done():
                        task.result()
                curve.append((self._counted_tokens(bootstrap), self._perplexity(bootstrap)))
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            await asyncio.gather(*self._endings)
        possible, missed = self._commits(bootstrap, len(curve))
        return Outcome(
            curve=curve,
            num_killed=self._num["kill"],
            num_left=self._num["leave"],
            possible=possible,
            committed=possible - len(missed),
            missed=missed,
            violations=[
                violation
                for histories in read_histories(place.directory).values()
                for violation in check(histories).violations
            ],
        )

    async def _seat(self) -> None:
        """One place in the swarm: a peer, its end, its return or somebody else, and so on."""
        name = self._new_name()
        while True:
            peer = await self._place.join(name, step_seconds=self._churn.step_seconds)
            life = self._note_life(peer)
            assert peer.task is not None
            peer.keeper.node.events.listen(self._note_training)
            if self._churn.lifetime_rounds is None:
                await asyncio.wait({peer.task})
                return
            mean_seconds = self._churn.lifetime_rounds * self._round_seconds
            await asyncio.wait({peer.task}, timeout=self._random.expovariate(1 / mean_seconds))
            if peer.task.done():
                peer.task.result()
            end = self._random.choice(["kill", "leave"])
            self._num[end] += 1
            self._lives[life] = (peer.peer_id, self._lives[life][1], now())
            ending = self._place.kill(name) if end == "kill" else self._place.leave(name)
            self._endings.append(asyncio.ensure_future(ending))
            await asyncio.shield(self._endings[-1])  # whoever has begun to go is gone in the end
            absence_seconds = ABSENCE_ROUNDS * self._round_seconds
            await asyncio.sleep(self._random.expovariate(1 / absence_seconds))
            name = self._random.choice([name, self._new_name()])

    def _new_name(self) -> str:
        self._num_names += 1
        return f"peer{self._num_names}"

    def _note_life(self, peer: LabPeer) -> int:
        self._lives.append((peer.peer_id, now(), None))
        return len(self._lives) - 1

    def _note_training(self, event: Mapping[str, object]) -> None:
        if event["event"] == "contributed":
            path = PathID.parse(str(event["path"]))
            slot = event["slot"]
            assert isinstance(slot, int)
            self._trained.setdefault(slot, set()).update(self._topology.modules_of(path))

    def _commits(self, bootstrap: LabPeer, num_slots: int) -> tuple[int, list[str]]:
        """Slots of modules that could commit, and which of them did not."""
        possible = 0
        missed = []
        for module, held in bootstrap.keeper.node.log.held.items():
            slots = {certificate.ballot.slot for certificate in held.chain}
            for slot, roster in self._rosters(held.chain, num_slots):
                there = sum(self._is_there(peer, slot) for peer in roster)
                if module in self._trained.get(slot, ()) and there > len(roster) // 2:
                    possible += 1
                    if slot not in slots:
                        missed.append(f"{module} in slot {slot}, {there} of {len(roster)} there")
        return possible, missed

    @staticmethod
    def _rosters(
        chain: Sequence[Certificate], num_slots: int
    ) -> Iterator[tuple[int, Sequence[str]]]:
        """The certified roster of every slot after the first certificate."""
        for slot in range(num_slots):
            before = [c for c in chain if c.ballot.slot < slot]
            if before:
                yield slot, [seat.peer for seat in before[-1].proposal.next_roster]

    def _is_there(self, peer: str, slot: int) -> bool:
        """Whether a peer was running from the end of a slot to the end of its last attempt."""
        begin = self._place.run.manifest.slot_start(slot + 1)
        end = begin + 0.75 * self._round_seconds
        return any(
            peer == other and since <= begin and (until is None or until >= end)
            for other, since, until in self._lives
        )

    @staticmethod
    def _counted_tokens(bootstrap: LabPeer) -> int:
        [shared] = [held for module, held in bootstrap.keeper.node.log.held.items()
                    if module.level == 0]  # fmt: skip
        return sum(
            commitment.tokens
            for certificate in shared.chain
            for commitment in certificate.proposal.contributions
        )

    def _perplexity(self, bootstrap: LabPeer) -> float:
        """Of the whole model as it is certified: each path on the validation rows of its shard."""
        config, topology, log = self._config, self._topology, bootstrap.keeper.node.log
        total = NOTHING
        for path in topology.paths:
            for module in topology.modules_of(path):
                write_module(self._net, topology, module, log.load_state(module).parameters)
            rows = self._place.run.shards[path].valid[: config.rounds.eval_sequences]
            total += evaluate(
                self._net,
                torch.from_numpy(rows.astype(np.int64)),
                prefix_tokens=config.routing.prefix_tokens,
                model=config.model,
            )
        return total.perplexity


async def soak(
    config: RunConfig, directory: Path, churn: Churn, *, prepared: Start | None = None
) -> Outcome:
    """Run it in a new directory, on random tokens if there is no `prepared` text."""
    async with lab(directory, config, prepared=prepared, seed=churn.seed) as place:
        return await Soak(place, churn).run()


def perplexity_at(curve: Sequence[tuple[int, float]], tokens: float) -> float:
    """Perplexity after so many counted tokens, between two slots by a straight line."""
    for (before, high), (after, low) in pairwise(curve):
        if before <= tokens <= after and after > before:
            return high + (low - high) * (tokens - before) / (after - before)
    raise ValueError(f"the curve does not reach {tokens} tokens")
