"""The swarm as the DHT shows it: peers, paths, rounds, versions, digests, perplexity."""

import math
from dataclasses import asdict, dataclass
from typing import Any

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
    peers: tuple[PeerLine, ...]
    modules: tuple[ModuleLine, ...]

    @property
    def perplexity(self) -> float | None:
        """Of the whole model: every path on the validation part of its shard, each path once."""
        latest = {line.path: line for line in sorted(self.peers, key=lambda line: line.round)}
        tokens = sum(line.valid_tokens for line in latest.values())
        if not tokens:
            return None
        return math.exp(min(700.0, sum(line.valid_nll for line in latest.values()) / tokens))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        lines = [{**asdict(line), "perplexity": line.perplexity} for line in self.peers]
        return {**asdict(self), "peers": lines, "perplexity": self.perplexity}


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
        peers=tuple(peers),
        modules=tuple(modules),
    )


def status_tables(status: SwarmStatus) -> list[Table]:
    """The same as tables for a terminal."""
    run = f"run {status.name} ({status.run[:12]}), manifest {status.manifest}, slot {status.slot}"
    peers = Table(title=run, expand=False)
    for heading in ("peer", "path", "round", "tokens", "commits", "training", "sent", "received"):
        peers.add_column(heading, justify="left" if heading == "peer" else "right")
    peers.add_column("perplexity", justify="right")
    for line in status.peers:
        peers.add_row(
            line.peer[-8:],
            line.path,
            f"{line.round}/{status.num_rounds}",
            f"{line.tokens:,}",
            str(line.commits),
            f"{line.inner_share:.0%}",
            f"{line.sent_bytes / 2**20:.1f} MiB",
            f"{line.received_bytes / 2**20:.1f} MiB",
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
            "yes" if module.agreed else "NO",
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
