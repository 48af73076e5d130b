"""The swarm as the DHT shows it: peers, paths, rounds, versions, digests, perplexity."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from dht.keys import announcement_key, head_key
from dht.records import Announcement, Head
from dht.swarm import Swarm
from peer.manifest import Manifest


@dataclass(frozen=True, kw_only=True, slots=True)
class PeerLine:
    """One peer that trains."""

    peer: str
    path: str
    round: int
    tokens: int
    commits: int
    inner_share: float
    sent_bytes: int
    received_bytes: int
    valid_nll: float  # nats, summed over `valid_tokens` of the path's validation part
    valid_tokens: int

    @property
    def perplexity(self) -> float | None:
        """Of its path, as the peer measured it; None before it did."""
        if not self.valid_tokens:
            return None
        return math.exp(min(700.0, self.valid_nll / self.valid_tokens))


@dataclass(frozen=True, kw_only=True, slots=True)
class ModuleLine:
    """One module: the newest version that anyone announces, and who agrees on it."""

    module: str
    version: int
    state: str
    holders: int
    behind: int  # holders of an older version
    agreed: bool  # all holders of that version announce the same digest


@dataclass(frozen=True, kw_only=True, slots=True)
class SwarmStatus:
    """A snapshot of the swarm; records are rumours, so figures are what peers say of themselves."""

    run: str
    name: str
    manifest: int  # the version in force
    slot: int
    num_rounds: int
    num_paths: int
    peers: tuple[PeerLine, ...]
    modules: tuple[ModuleLine, ...]

    @property
    def measured_paths(self) -> dict[str, PeerLine]:
        """Of each path that somebody has measured, the latest figures."""
        measured = [line for line in self.peers if line.valid_tokens]
        return {line.path: line for line in sorted(measured, key=lambda line: line.round)}

    @property
    def perplexity(self) -> float | None:
        """Of the measured paths, each on the validation part of its shard: all, or a part."""
        lines = self.measured_paths.values()
        tokens = sum(line.valid_tokens for line in lines)
        if not tokens:
            return None
        return math.exp(min(700.0, sum(line.valid_nll for line in lines) / tokens))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        lines = [{**asdict(line), "perplexity": line.perplexity} for line in self.peers]
        measured = {"measured_paths": sorted(self.measured_paths), "perplexity": self.perplexity}
        return {**asdict(self), "peers": lines, **measured}


async def read_status(swarm: Swarm, run: str, manifest: Manifest) -> SwarmStatus:
    """Read all announcements and heads of a run."""
    peers: list[PeerLine] = []
    for path in manifest.topology.paths:
        records = await swarm.read(announcement_key(run, str(path)))
        peers += [_peer_line(record) for record in records if isinstance(record, Announcement)]
    modules = []
    for module in manifest.topology.modules:
        records = await swarm.read(head_key(run, str(module)))
        heads = [record for record in records if isinstance(record, Head)]
        modules.append(_module_line(str(module), heads))
    return SwarmStatus(
        run=run,
        name=manifest.name,
        manifest=manifest.version,
        slot=manifest.slot_at(swarm.now()),
        num_rounds=manifest.run_config.rounds.num_rounds,
        num_paths=manifest.topology.num_paths,
        peers=tuple(peers),
        modules=tuple(modules),
    )


def status_tables(status: SwarmStatus) -> list[Table]:
    """The same as tables for a terminal."""
    run = f"run {status.name} ({status.run[:12]}), manifest {status.manifest}, slot {status.slot}"
    # As narrow as 80 columns, so that nothing is cut off.
    peers = Table(title=run, box=SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    peers.add_column("peer", no_wrap=True)
    for heading in ("path", "round", "M tokens", "commits", "train", "MiB out", "in", "ppl"):
        peers.add_column(heading, justify="right", no_wrap=True)
    for line in status.peers:
        peers.add_row(
            f"...{line.peer[-6:]}",
            line.path,
            f"{line.round}/{status.num_rounds}",
            f"{line.tokens / 1e6:.2f}",
            str(line.commits),
            f"{line.inner_share:.0%}",
            f"{line.sent_bytes / 2**20:.1f}",
            f"{line.received_bytes / 2**20:.1f}",
            f"{line.perplexity:.1f}" if line.perplexity else "-",
        )
    modules = Table(expand=False)
    for heading in ("module", "version", "digest", "holders", "behind", "agreed"):
        modules.add_column(heading, justify="right")
    for module in status.modules:
        modules.add_row(
            module.module,
            str(module.version),
            module.state[:12] or "-",
            str(module.holders),
            str(module.behind),
            ("yes" if module.agreed else "NO") if module.holders else "lost",
        )
    return [peers, modules]


def _peer_line(record: Announcement) -> PeerLine:
    return PeerLine(
        peer=record.peer,
        path=record.path,
        round=record.round,
        tokens=record.tokens,
        commits=record.commits,
        inner_share=record.inner_share,
        sent_bytes=record.sent_bytes,
        received_bytes=record.received_bytes,
        valid_nll=record.valid_nll or 0.0,
        valid_tokens=record.valid_tokens,
    )


def _module_line(module: str, heads: list[Head]) -> ModuleLine:
    version = max((head.version for head in heads), default=0)
    newest = [head for head in heads if head.version == version]
    states = sorted({head.state for head in newest})
    return ModuleLine(
        module=module,
        version=version,
        state=states[0] if states else "",
        holders=len(newest),
        behind=len(heads) - len(newest),
        agreed=len(states) <= 1,
    )
