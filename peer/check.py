"""`dipaco-peer check`: a dry run of everything that could go wrong, each with its fix."""

import asyncio
import shutil
from collections.abc import AsyncIterator
from dataclasses import dataclass

from dht.errors import SwarmError
from dipaco.errors import DipacoError
from peer.config import PeerConfig
from peer.devices import choose_device
from peer.hello import clock_skew_seconds, say_hello
from peer.join import reachable_addresses
from peer.limits import divide, gigabytes
from peer.reachability import Standing
from peer.session import enter_run, find_run, open_network, raise_open_files, run_directory

MIN_OPEN_FILES = 1024  # one per stream and blob, p2pd's own not counted


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that was looked at."""

    name: str
    ok: bool
    text: str
    fix: str = ""


async def run_checks(config: PeerConfig) -> AsyncIterator[Finding]:
    """Look at everything that `join` needs; a finding as soon as it is there."""
    yield check_open_files()
    what = "swarm"
    try:
        async with open_network(config) as network:
            yield Finding(name="swarm", ok=True, text="entered through the given address")
            found = await find_run(network, config.initial_peers)
            asked_at = network.swarm.now()
            reply = await say_hello(network.transport, next(iter(found.newest)))
            skew = clock_skew_seconds(reply, asked_at=asked_at, answered_at=network.swarm.now())
            yield Finding(name="clock", ok=True, text=f"{abs(skew):.1f} s off the swarm's")
            yield check_addresses(await reachable_addresses(network))
            yield check_standing(await network.reachability.settle(list(found.newest)))
            run_dir = run_directory(config.state_dir, found.run)
            node = await enter_run(network, found, run_dir)
            node.events.close()
            manifest = node.manifest
            yield Finding(name="run", ok=True, text=f"{manifest.name} ({found.run[:12]})")
            free = shutil.disk_usage(config.state_dir).free
            yield Finding(name="disk", ok=True, text=f"{gigabytes(free)} free")
            what = "device"
            choice = await asyncio.to_thread(
                choose_device, config, manifest.run_config, manifest.topology
            )
            yield Finding(name="device", ok=True, text=choice.description)
            what = "limits"
            divide(config, manifest, run_dir=run_dir, trains_on_cpu=choice.device.type == "cpu")
    except (SwarmError, DipacoError) as error:
        yield Finding(name=what, ok=False, text=str(error), fix=error.hint)


def check_open_files() -> Finding:
    """The limit on open files, which every peer raises as far as it may."""
    num_files = raise_open_files()
    is_enough = num_files >= MIN_OPEN_FILES
    return Finding(
        name="open files",
        ok=is_enough,
        text=f"up to {num_files}",
        fix="" if is_enough else f"`ulimit -n {MIN_OPEN_FILES}` before you start",
    )


def check_standing(standing: Standing) -> Finding:
    """Whether others can dial this machine, as they say themselves."""
    fix = (
        ""
        if standing.is_dialled is not False or standing.port is None
        else (
            f"forward TCP port {standing.port} of your router to this machine, and keep that port: "
            f"`--host-maddr /ip4/0.0.0.0/tcp/{standing.port}`"
        )
    )
    return Finding(name="reachability", ok=True, text=standing.text, fix=fix)


def check_addresses(maddrs: list[str]) -> Finding:
    """Whether this machine has an address that others could dial."""
    public = [maddr for maddr in maddrs if "/ip4/127." not in maddr and "/ip6/::1" not in maddr]
    if public:
        return Finding(name="addresses", ok=True, text=", ".join(public[:3]))
    return Finding(
        name="addresses",
        ok=True,
        text="loopback only: peers on this machine can reach you, others cannot",
        fix="listen on all interfaces: `--host-maddr /ip4/0.0.0.0/tcp/31337`",
    )
