"""The same kills of four processes that average with `hivemind.DecentralizedAverager`.

A whole node (its processes and its p2pd) is killed or stopped a little after the all-reduce began.
What counts is what the three others hold then: whether their step ended, whether it said that it
succeeded, whether their bytes are equal, and how many elements were averaged at all.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from tests.faults.peer_process import die_with_parent

NUM_PEERS = 4
NUM_ELEMENTS = 12_000_000  # 48 MB of float32
GROUP_SECONDS = 40.0  # to start, and to form a group
STEP_SECONDS = 45.0  # from the beginning of the all-reduce; whoever takes longer hangs
PREFIX = "faults"

_context = multiprocessing.get_context("forkserver")


@dataclass(frozen=True, kw_only=True)
class AveragerCell:
    """One fault of the first node, so long after the all-reduce began."""

    signal: signal.Signals
    after_seconds: float
    options: dict[str, float] = field(default_factory=dict)  # of the averager

    def __str__(self) -> str:
        options = ", ".join(f"{name} {value:.0f} s" for name, value in self.options.items())
        return f"{self.signal.name} after {self.after_seconds} s, {options or 'as it comes'}"


@dataclass(frozen=True, kw_only=True)
class AveragerOutcome:
    """What the survivors of one fault say."""

    cell: AveragerCell
    finished: int = 0  # steps that ended in time
    succeeded: int = 0  # and without an exception
    num_states: int = 0  # different bytes among the survivors
    averaged_share: float = 0.0  # of the elements, at the survivor with the fewest
    seconds: float = 0.0  # until the last step ended, or was given up
    failure: str = ""


def averager_cells() -> Iterator[AveragerCell]:
    """Eight faults: early and late, with and without the timeouts that there are."""
    chunk, whole = {"next_chunk_timeout": 2.0}, {"allreduce_timeout": 8.0}
    for after in (0.15, 0.3, 0.5):
        yield AveragerCell(signal=signal.SIGKILL, after_seconds=after)
    for after in (0.15, 0.3):
        yield AveragerCell(signal=signal.SIGKILL, after_seconds=after, options=chunk)
    for options in ({}, chunk, whole):
        yield AveragerCell(signal=signal.SIGSTOP, after_seconds=0.15, options=options)


def run_averager(cell: AveragerCell) -> AveragerOutcome:
    """Four fresh processes, one averaging, one fault; nothing is left afterwards."""
    nodes = []
    try:
        address: list[str] = []
        for rank in range(NUM_PEERS):
            here, there = _context.Pipe()
            arguments = (rank, address, dict(cell.options), there)
            process = _context.Process(target=_average, args=arguments)
            process.start()
            there.close()
            nodes.append((process, here))
            address = [_receive(here, GROUP_SECONDS)] if rank == 0 else address
        for _, pipe in nodes:
            _receive(pipe, GROUP_SECONDS)  # it has found the group
        for _, pipe in nodes:
            pipe.send("go")
        begin = time.monotonic()
        time.sleep(cell.after_seconds)
        os.killpg(nodes[0][0].pid or 0, cell.signal)
        ends = []
        for _, pipe in nodes[1:]:
            left = max(0.0, begin + STEP_SECONDS - time.monotonic())
            ends.append(pipe.recv() if pipe.poll(left) else None)
        return _outcome(cell, ends, time.monotonic() - begin)
    except (EOFError, OSError, TimeoutError) as error:
        return AveragerOutcome(cell=cell, failure=f"no group, no fault: {error}")
    finally:
        for process, pipe in nodes:
            _kill_group(process)
            pipe.close()


def _outcome(
    cell: AveragerCell, ends: list[dict[str, Any] | None], seconds: float
) -> AveragerOutcome:
    reports = [end for end in ends if end is not None]
    return AveragerOutcome(
        cell=cell,
        finished=len(reports),
        succeeded=sum(not report["error"] for report in reports),
        num_states=len({report["digest"] for report in reports}),
        averaged_share=min((report["averaged_share"] for report in reports), default=0.0),
        seconds=seconds,
    )


def _average(
    rank: int, initial_peers: list[str], options: dict[str, float], pipe: Connection
) -> None:
    """One node: find the group, wait for the word, average, say what came out."""
    die_with_parent()
    os.setsid()  # so that its p2pd and its other processes are hit together with it
    _to_devnull()

    import hashlib

    import torch
    from hivemind import DHT, DecentralizedAverager
    from hivemind.averaging.control import AveragingStage

    multiprocessing.set_start_method("fork", force=True)  # hivemind relies on it
    torch.set_num_threads(1)
    dht = DHT(initial_peers=initial_peers, host_maddrs=["/ip4/127.0.0.1/tcp/0"], start=True)
    if rank == 0:
        pipe.send(str(dht.get_visible_maddrs()[0]))
    value = 3.0**rank  # the mean of no group is what one of its members began with
    averager = DecentralizedAverager(
        [torch.full((NUM_ELEMENTS,), value)],
        dht,
        start=True,
        prefix=PREFIX,
        target_group_size=NUM_PEERS,
        **options,
    )
    control = averager.step(wait=False, require_trigger=True, timeout=GROUP_SECONDS)
    deadline = time.monotonic() + GROUP_SECONDS
    while control.stage != AveragingStage.AWAITING_TRIGGER and time.monotonic() < deadline:
        time.sleep(0.01)
    pipe.send(control.stage.name)
    pipe.recv()
    control.allow_allreduce()
    error = ""
    try:
        control.result(STEP_SECONDS)
    except BaseException as problem:  # whatever it raises is what it does
        error = repr(problem)
    with averager.get_tensors() as tensors:
        values = tensors[0].clone()
    pipe.send(
        {
            "error": error,
            "digest": hashlib.sha256(values.numpy().tobytes()).hexdigest(),
            "averaged_share": float((values != value).float().mean()),
        }
    )


def _receive(pipe: Connection, within: float) -> Any:  # noqa: ANN401
    if not pipe.poll(within):
        raise TimeoutError(f"a node said nothing for {within:.0f} s")
    return pipe.recv()


def _kill_group(process: Any) -> None:  # noqa: ANN401
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        process.kill()
    process.join()


def _to_devnull() -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
