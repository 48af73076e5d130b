"""`dipaco-peer join`: become a volunteer of the run that an address belongs to."""

import asyncio
import os
import shutil
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from functools import partial
from pathlib import Path
from random import SystemRandom
from typing import TypeVar

import torch
import torch._dynamo  # before there are threads: if two are the first to need it, one of them fails

from dht.errors import Unreachable
from dht.keys import announcement_key
from dht.records import MAX_MADDRS
from dipaco.checkpoint import write_atomically
from dipaco.imports import INTERRUPTED
from peer.boundary import guarded
from peer.config import PeerConfig
from peer.devices import choose_device, trainer_factory
from peer.display import Display
from peer.keeper import Keeper
from peer.limits import divide, gigabytes
from peer.node import Node, Offload
from peer.providers import Providers
from peer.reachability import Standing
from peer.session import ADDRESS_FILE, Network, open_node
from peer.volunteer import Volunteer

T = TypeVar("T")

MAX_PATHS_READ = 8  # to find peers that tell how we are reached
COMPUTING_NICENESS = 10  # the volunteer's own programs, and answering other peers in time, go first
TRAINING_NICENESS = 15  # and what others wait for before inner steps
LEAVE_SECONDS = 10.0  # after Ctrl-C, for the inner steps under way and the optimizer


async def join(config: PeerConfig, display: Display) -> None:
    """Train until the run is over, then keep serving, until interrupted."""
    torch.set_num_threads(config.threads)
    asyncio.get_running_loop().set_default_executor(threads(8, COMPUTING_NICENESS))
    display.say("network", "starting p2pd and entering the swarm")
    async with open_node(config) as (node, providers, network, book):
        if not providers.hints:
            display.say("network", "nobody answers; going on with what is here, and looking on")
        manifest = node.manifest
        choice = await asyncio.to_thread(
            choose_device, config, manifest.run_config, manifest.topology
        )
        limits = divide(
            config,
            manifest,
            run_dir=node.state_dir,
            trains_on_cpu=choice.device.type == "cpu",
        )
        standing = await network.reachability.settle(await others(node, providers))
        addresses = list(standing.maddrs) or await reachable_addresses(network)
        display.introduce(
            run=f"{manifest.name} ({node.run[:12]}), by {manifest.peer}",
            peer=node.peer_id,
            addresses=addresses,
            reach=standing.text,
            device=choice.description,
            disk=f"{node.state_dir}, {gigabytes(shutil.disk_usage(node.state_dir).free)} free",
        )
        write_address_file(config.state_dir, addresses)
        note_standing(node, standing)
        node.events.listen(display.show)
        node.log.max_recent_bytes = limits.recent_bytes
        node.store.limit_bytes = limits.blob_bytes
        keeper = Keeper(node, providers, duty_bytes=limits.duty_bytes)
        keeper.presence.room_bytes = limits.training_bytes
        keeper.presence.maddrs = standing.maddrs[:MAX_MADDRS]
        keeper.survey.on_addresses = book.note
        train_in = offload_to(threads(1, TRAINING_NICENESS))
        volunteer = Volunteer(
            keeper, trainer_factory(choice), train_in=train_in, paths_kept=limits.paths_kept
        )
        stop_on_signals(volunteer.stop.set, display)
        async with keeper.running():
            keeper.background.start(
                stay_reachable(network, keeper, config.state_dir), "reachability"
            )
            await _train_until_stopped(volunteer)
            if not volunteer.stop.is_set():
                display.say("run", "finished; still serving others, Ctrl-C to leave")
                await volunteer.stop.wait()
        display.say("network", "left the swarm")


async def stay_reachable(network: Network, keeper: Keeper, state_dir: Path) -> None:
    """Follow the relays as they come and go, and this machine from network to network."""
    while True:  # a full disk must not end it, nor a p2pd that is restarted; it begins with a pause
        following = _follow_changes(network, keeper, state_dir)
        await guarded(following, "reachability", keeper.node.events)


async def _follow_changes(network: Network, keeper: Keeper, state_dir: Path) -> None:
    node, providers = keeper.node, keeper.providers
    async with aclosing(network.reachability.changes(partial(others, node, providers))) as changes:
        async for standing in changes:
            keeper.presence.maddrs = standing.maddrs[:MAX_MADDRS]
            note_standing(node, standing)
            addresses = list(standing.maddrs) or await reachable_addresses(network)
            write_address_file(state_dir, addresses)


def note_standing(node: Node, standing: Standing) -> None:
    """Log how others reach this peer."""
    node.events.write(
        "reachability",
        dialled=standing.is_dialled,
        relays=list(standing.relays),
        text=standing.text,
    )


async def others(node: Node, providers: Providers) -> list[str]:
    """Who can be asked about this peer: those whose address was given, then those who train.

    The latter by lot: anyone may say that it trains, under a peer ID that comes early.
    """
    training: set[str] = set()
    with suppress(Unreachable):
        for path in node.manifest.topology.paths[:MAX_PATHS_READ]:
            records = await node.swarm.read(announcement_key(node.run, str(path)))
            training.update(record.peer for record in records)
    drawn = SystemRandom().sample(sorted(training), len(training))
    return [peer for peer in dict.fromkeys([*providers.hints, *drawn]) if peer != node.peer_id]


async def _train_until_stopped(volunteer: Volunteer) -> None:
    """Until the run is over; once asked to stop, training has `LEAVE_SECONDS` to come to an end."""
    training = asyncio.create_task(volunteer.run())
    stopping = asyncio.create_task(volunteer.stop.wait())
    await asyncio.wait({training, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    try:
        await asyncio.wait_for(training, LEAVE_SECONDS)
    except TimeoutError:
        return  # it was waiting for other peers, and has nothing to lose


def threads(num_threads: int, niceness: int) -> ThreadPoolExecutor:
    """Threads that compute at low priority."""

    def lower_priority() -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), niceness)

    return ThreadPoolExecutor(max_workers=num_threads, initializer=lower_priority)


def offload_to(executor: ThreadPoolExecutor) -> Offload:
    """Runs functions in these threads."""

    async def offload(function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(executor, function)

    return offload


async def reachable_addresses(network: Network) -> list[str]:
    """Where others reach this peer; the ones to hand out come last."""
    maddrs = await network.swarm.maddrs()
    return sorted(maddrs, key=lambda maddr: "/ip4/127." not in maddr)


def write_address_file(state_dir: Path, addresses: list[str]) -> None:
    """Leave this peer's addresses where scripts find them, one a line."""
    text = "".join(f"{address}\n" for address in addresses)
    write_atomically(state_dir / ADDRESS_FILE, text.encode())


def stop_on_signals(stop: Callable[[], None], display: Display) -> None:
    """The first Ctrl-C (or SIGTERM) leaves in good order, the second one at once."""
    loop = asyncio.get_running_loop()
    seen = 0

    def on_signal() -> None:
        nonlocal seen
        seen += 1
        if seen > 1:
            os._exit(INTERRUPTED)  # p2pd dies with us: the kernel sees to it
        display.say("network", "leaving; Ctrl-C again to leave at once")
        stop()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)
