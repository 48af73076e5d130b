"""What came out of the demonstration: figures, tables, and whether its promises held."""

from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from dipaco.checkpoint import decode_state
from dipaco.evaluate import total
from dipaco.inner import PathTrainer
from dipaco.model import num_parameters
from dipaco.rounds import Evaluations
from dipaco.start import Start
from dipaco.topology import ModuleID
from examples.demo_volunteer import WORK, Volunteer, newest_versions
from peer.store import BlobStore
from tests.history_checker import check, read_histories

SHARED_BY_ALL = "0.0"  # the embedding: whoever contributes to a round contributes to it


def evaluate(start: Start, digests: dict[str, str]) -> tuple[Evaluations, Evaluations]:
    """Every path at the start and at the end, on the validation part of its shard."""
    at_start, at_end = {}, {}
    for path in start.topology.paths:
        trainer = PathTrainer(start.config, start.topology, path, start.shard(path))
        for module in trainer.modules:
            trainer.write_module(module, start.module_state(module).parameters)
        at_start[path] = trainer.evaluate(start.config.rounds.eval_sequences)
        for module in trainer.modules:
            trainer.write_module(module, final_parameters(start, module, digests[str(module)]))
        at_end[path] = trainer.evaluate(start.config.rounds.eval_sequences)
    return at_start, at_end


def final_parameters(start: Start, module: ModuleID, digest: str) -> torch.Tensor:
    """A module's final state from whichever volunteer holds it, checked by its digest."""
    size = num_parameters(start.config.model, start.topology, module)
    for blobs in WORK.glob("peer*/runs/*/blobs"):
        raw = BlobStore(blobs).read(digest)
        if raw is not None:
            return decode_state(raw, num_parameters=size).parameters
    raise SystemExit(f"no volunteer has module {module} with digest {digest[:12]}")


def digests_by_version(volunteers: list[Volunteer]) -> dict[tuple[str, int], set[str]]:
    """Every state that any volunteer ever applied, by module and version."""
    states: dict[tuple[str, int], set[str]] = {}
    for volunteer in volunteers:
        for entry in volunteer.events:
            if entry["event"] in ("version", "caught up"):
                states.setdefault((entry["module"], entry["version"]), set()).add(entry["state"])
    return states


def report(
    start: Start,
    volunteers: list[Volunteer],
    status: dict[str, Any],
    dense: Evaluations,
    *,
    versions_at_kill: dict[str, int],
) -> dict[str, Any]:
    """What the tables show, and what was promised."""
    digests = {module["module"]: module["state"] for module in status["modules"]}
    at_start, at_end = evaluate(start, digests)
    versions = newest_versions(volunteers)
    return {
        "perplexity": {
            "start": total(at_start).perplexity,
            "end": total(at_end).perplexity,
            "dense": total(dense).perplexity,
        },
        "paths": {
            str(path): {
                "start": at_start[path].perplexity,
                "end": at_end[path].perplexity,
                "dense": dense[path].perplexity,
            }
            for path in at_start
        },
        "peers": [peer_figures(volunteer) for volunteer in volunteers],
        "modules": [
            {**module, "version_at_kill": versions_at_kill.get(module["module"], 0)}
            for module in status["modules"]
        ],
        "digests_agree": all(len(s) == 1 for s in digests_by_version(volunteers).values())
        and all(module["agreed"] for module in status["modules"]),
        "history": history_figures(WORK),
        "advanced_after_kill": all(
            version > versions_at_kill.get(module, 0) for module, version in versions.items()
        ),
    }


def history_figures(directory: Path) -> dict[str, Any]:
    """What all event logs together show: certificates and votes, and what is wrong with them."""
    [histories] = read_histories(directory).values()
    verdict = check(histories)
    return {
        "certificates": verdict.num_certificates,
        "votes": verdict.num_votes,
        "violations": list(verdict.violations),
    }


def peer_figures(volunteer: Volunteer) -> dict[str, Any]:
    """What one volunteer did and what it cost."""
    last = volunteer.last("contributed")
    counted = {
        entry["version"]
        for entry in volunteer.events
        if entry["event"] == "version"
        and entry["module"] == SHARED_BY_ALL
        and volunteer.peer_id in entry["contributors"]
    }
    # Its first path: it may have moved to another one later.
    ready = next((e for e in volunteer.events if e["event"] == "path"), {})
    first = volunteer.last("first step")
    return {
        "peer": volunteer.name,
        "status": volunteer.status,
        "rounds_committed": len(counted),
        "steps": last.get("steps", 0),
        "tokens": last.get("tokens", 0),
        "sent_bytes": last.get("sent_bytes", 0),
        "received_bytes": last.get("received_bytes", 0),
        "inner_share": last.get("inner_share", 0.0),
        "ready_seconds": round(ready["time"] - volunteer.launch_time, 1) if ready else None,
        "first_step_seconds": round(first["time"] - volunteer.launch_time, 1) if first else None,
    }


def print_report(console: Console, figures: dict[str, Any]) -> None:
    """The three tables, and one line of verdict each."""
    table = Table(title="validation perplexity (lower is better)")
    for heading in ("path", "start", "end", "dense"):
        table.add_column(heading, justify="right")
    for path, row in [*figures["paths"].items(), ("whole model", figures["perplexity"])]:
        table.add_row(path, *(f"{row[key]:.2f}" for key in ("start", "end", "dense")))
    console.print(table)
    peers = Table(title="peers")
    for heading in ("peer", "", "rounds", "steps", "tokens", "sent", "received", "training"):
        peers.add_column(heading, justify="left" if heading in ("peer", "") else "right")
    for peer in figures["peers"]:
        peers.add_row(
            peer["peer"],
            peer["status"],
            str(peer["rounds_committed"]),
            str(peer["steps"]),
            f"{peer['tokens']:,}",
            f"{peer['sent_bytes'] / 2**20:.1f} MiB",
            f"{peer['received_bytes'] / 2**20:.1f} MiB",
            f"{peer['inner_share']:.1%}",
        )
    console.print(peers)
    modules = Table(title="modules: the digest that all holders agree on")
    for heading in ("module", "version", "at the kill", "holders", "digest"):
        modules.add_column(heading, justify="right")
    for module in figures["modules"]:
        modules.add_row(
            module["module"],
            str(module["version"]),
            str(module["version_at_kill"]),
            str(module["holders"]),
            module["state"][:24] if module["agreed"] else "NO AGREEMENT",
        )
    console.print(modules)


def verdicts(figures: dict[str, Any]) -> dict[str, bool]:
    """What the demonstration promises, and whether it held."""
    perplexity = figures["perplexity"]
    return {
        "all holders agree on every version of every module": figures["digests_agree"],
        "the peers' event logs show a sound history": not figures["history"]["violations"],
        "every module advanced after the kill": figures["advanced_after_kill"],
        "the whole model beats its start": perplexity["end"] < perplexity["start"],
        "the whole model beats the dense model": perplexity["end"] < perplexity["dense"],
    }
