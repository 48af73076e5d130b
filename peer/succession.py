"""What the next version of a manifest may change, and what it may not. Pure functions.

The operator may give a running swarm another router, other shards, more modules in a level, and
other settings of routing, rounds and optimizers. What all peers rely on stays: the model, the
tokenizer, the clock, the modules that exist, and which of them a path is made of.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dht.errors import BadMessage
from dipaco.checkpoint import state_bytes
from dipaco.config import RunConfig
from dipaco.errors import ConfigError
from dipaco.model import num_parameters
from dipaco.topology import ModuleID, PathID, Topology
from peer.manifest import Birth, BlobRef, Manifest, Origin, ShardRef

# Of the configuration, and of the rest of the manifest.
_FIXED_SECTIONS = ("name", "seed", "model", "corpus", "dense_start")
_FIXED_FIELDS = ("protocol", "name", "start_time", "tokenizer", "router_data", "starts")


def check_successor(new: Manifest, old: Manifest, *, sender: str) -> None:
    """Raise `BadMessage` unless `new`, which its signer signed, may follow `old`."""

    def require(condition: bool, why: str) -> None:
        if not condition:
            raise BadMessage(sender, f"manifest {new.version} cannot follow {old.version}: {why}")

    require(new.peer == old.peer, "another operator signed it")
    require(new.version == old.version + 1, "it is not the next version")
    require(new.predecessor == old.digest, "it names another predecessor")
    require(new.first_slot > old.first_slot, "it begins before the one it follows")
    require(new.num_phases - old.num_phases in (0, 1), "it leaves out a phase of the routing")
    for field in _FIXED_FIELDS:
        require(getattr(new, field) == getattr(old, field), f"it changes {field}")
    ours, theirs = old.run_config, new.run_config
    for section in _FIXED_SECTIONS:
        require(getattr(theirs, section) == getattr(ours, section), f"it changes {section}")
    require(theirs.rounds.round_seconds == ours.rounds.round_seconds, "it changes round_seconds")
    fault = growth_fault(ours, theirs)
    require(fault is None, fault or "")
    require(_are_births_sound(new, old), "its new modules are not born from those that exist")


def growth_fault(old: RunConfig, new: RunConfig) -> str | None:
    """Why a run cannot grow from the levels of `old` to those of `new`, or None if it can."""
    before, after = old.topology, new.topology
    if (before.path_specific_blocks, before.path_specific_embedding) != (
        after.path_specific_blocks,
        after.path_specific_embedding,
    ):
        return "it changes which blocks are path-specific"
    if len(after.levels) != len(before.levels) or any(
        now < then for now, then in zip(after.levels, before.levels, strict=True)
    ):
        return "a level may only grow, and none is added"
    theirs, ours = Topology.of(new), Topology.of(old)
    if any(theirs.modules_of(path) != ours.modules_of(path) for path in ours.paths):
        return "it would give path-specific modules other numbers; grow the first level only"
    return None


def grown(config: RunConfig, levels: tuple[int, ...]) -> RunConfig:
    """The same run with `levels`; ConfigError if it cannot grow so."""
    values = config.to_dict()
    values["topology"] |= {"levels": levels}
    new = RunConfig.from_dict(values)
    fault = growth_fault(config, new)
    if fault is not None or new.topology == config.topology:
        raise ConfigError(
            f"levels {list(config.topology.levels)} cannot grow to {list(levels)}: "
            f"{fault or 'they are the same'}",
            hint="accepted: as many levels as there are, none of them smaller",
        )
    return new


def source_of(module: ModuleID, old: Topology, new: Topology) -> ModuleID:
    """The module of `old` that a new module begins as: the experts of a level in turn.

    A path-specific one begins as that of the path whose other modules its own are born from.
    """
    level = new.level(module.level)
    if not level.is_path_specific:
        return ModuleID(module.level, module.expert % old.level(module.level).num_experts)
    experts = new.path_at(module.expert).experts
    source = PathID(tuple(e % size for e, size in zip(experts, old.shape, strict=True)))
    return ModuleID(module.level, old.path_index(source))


@dataclass(frozen=True, kw_only=True, slots=True)
class ManifestDraft:
    """What the operator gives a run next; `num_phases` of its routing are then behind it."""

    config: RunConfig
    router: BlobRef
    shards: tuple[ShardRef, ...]
    num_phases: int


def successor(
    old: Manifest, draft: ManifestDraft, *, first_slot: int, newest: Mapping[ModuleID, Origin]
) -> Manifest:
    """The version after `old`, not signed yet.

    New modules begin as the states in `newest`: a certified one of each module of `old`.
    """
    before, after = old.topology, Topology.of(draft.config)
    births = []
    for module in after.modules:
        if not before.has_module(module):
            source = source_of(module, before, after)
            origin = newest[source]
            births.append(
                Birth(
                    module=str(module),
                    source=str(source),
                    version=origin.version,
                    state=origin.state,
                )
            )
    changes: dict[str, Any] = {
        "signature": "",
        "version": old.version + 1,
        "predecessor": old.digest,
        "first_slot": first_slot,
        "num_phases": draft.num_phases,
        "fingerprint": draft.config.fingerprint(),
        "config": draft.config.to_dict(),
        "router": draft.router,
        "shards": draft.shards,
        "births": tuple(births),
    }
    return Manifest(**{**_fields(old), **changes})


def _fields(manifest: Manifest) -> dict[str, Any]:
    return {name: getattr(manifest, name) for name in Manifest.model_fields}


def _are_births_sound(new: Manifest, old: Manifest) -> bool:
    """Whether every module that is new is born once, whole, and from one that exists."""
    before, after = old.topology, new.topology
    added = [str(module) for module in after.modules if not before.has_module(module)]
    if sorted(birth.module for birth in new.births) != sorted(added):
        return False
    existing = {str(module): module for module in before.modules}
    for birth in new.births:
        module, source = ModuleID.parse(birth.module), existing.get(birth.source)
        size = state_bytes(num_parameters(new.run_config.model, after, module))
        if source is None or source.level != module.level or birth.state.num_bytes != size:
            return False
    return True
