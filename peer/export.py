"""A path of a run, out of what a peer has on its disk: without a network; the peer may be running.

A volunteer has the modules of the path that it trains, and of those that it keeps for others; an
operator's node has all.
"""

from dataclasses import dataclass
from pathlib import Path

from dht.errors import LocalFault
from dipaco.checkpoint import decode_state
from dipaco.config import ModelConfig
from dipaco.early_stopping import Best, read_best
from dipaco.errors import BadState
from dipaco.model import PathNet, write_module
from dipaco.topology import ModuleID, PathID
from peer.history import History
from peer.manifest import parse_manifest
from peer.modules import STATES_KEPT, ModuleLog
from peer.path_files import BEST_SUFFIX, path_trained_last
from peer.store import BlobStore
from peer.stored_shard import stored_shard


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundPath:
    """A path's network, its tokenizer, and of which versions of its modules it is made."""

    net: PathNet
    tokenizer: bytes
    round: int  # the oldest version among its modules
    is_early_stopped: bool


class RunOnDisk:
    """One run in a peer's state directory; nothing in it is changed."""

    def __init__(self, state_dir: Path, run: str = "") -> None:
        """`run` is the beginning of its name, needed only where there are several.

        `LocalFault` if there is no such run.
        """
        # Who has looked at a run, and taken no part in it, has no directory of promises for it.
        directories = (each.parent for each in (state_dir / "runs").glob("*/promises"))
        found = sorted(d for d in directories if d.name.startswith(run))
        if len(found) != 1:
            names = ", ".join(directory.name for directory in found) or "none"
            raise LocalFault(
                f"`{state_dir}` holds {names} of the runs asked for",
                hint="name a peer's state directory with --state-dir, and one run of it with --run",
            )
        self._paths = found[0] / "paths"
        self._store = BlobStore(found[0] / "blobs")
        first = next((d for d in self._store.digests() if d.startswith(found[0].name)), None)
        raw = self._store.read(first) if first is not None else None
        if first is None or raw is None:
            raise LocalFault(f"`{found[0]}` lacks the run's manifest", hint=_HINT)
        manifest = parse_manifest(raw, digest=first, sender="disk")
        self._history = History(manifest, self._store, found[0] / "manifests")
        self._log = ModuleLog(found[0] / "modules", self._history, self._store)

    def path(self, name: str, *, early_stopped: bool | None = None) -> FoundPath:
        """A path as it was when it did best here (`early_stopped`), or as its newest versions are.

        None stands for its best if it is the path that this peer has trained last. Others go on
        without it, so what was best here may be long ago: of these, the newest versions. What did
        best on the shard of an earlier manifest is not the best.
        `LocalFault` if there is no such path, or not all of it is here.
        """
        topology = self._history.newest.topology
        try:
            path = PathID.parse(name)
            modules = topology.modules_of(path)
        except (ValueError, LookupError) as error:
            raise LocalFault(
                f"there is no path {name!r}",
                hint=f"paths go from {topology.paths[0]} to {topology.paths[-1]}",
            ) from error
        model = self._history.newest.run_config.model
        tokenizer = self._store.read(self._history.newest.tokenizer.digest)
        if tokenizer is None:
            raise LocalFault("the run's tokenizer is not here", hint=_HINT)
        if early_stopped is None:
            takes_best = path_trained_last(self._paths) == str(path)
        else:
            takes_best = early_stopped
        best = self._best(path, modules) if takes_best else None
        if early_stopped and best is None:
            raise LocalFault(
                f"this peer has not kept path {path} at its best",
                hint="a volunteer that has trained it for a round has",
            )
        net, round_ = self._newest(modules, model) if best is None else self._net(best, model)
        return FoundPath(
            net=net, tokenizer=tokenizer, round=round_, is_early_stopped=best is not None
        )

    def _newest(self, modules: tuple[ModuleID, ...], model: ModelConfig) -> tuple[PathNet, int]:
        net, versions = PathNet(model), []
        for module in modules:
            version, raw = self._state(module)
            try:
                state = decode_state(raw, num_parameters=self._log.num_parameters(module))
            except BadState as error:
                raise LocalFault(f"module {module} is damaged", hint=_HINT) from error
            write_module(net, self._history.newest.topology, module, state.parameters)
            versions.append(version)
        return net, min(versions)

    def _state(self, module: ModuleID) -> tuple[int, bytes]:
        """A module's newest version of which the state is here."""
        # Older states are deleted but for the origin's, so that nothing else may take their place.
        for version, digest in self._log.versions_on_disk(module)[:STATES_KEPT]:
            raw = self._store.read(digest)
            if raw is not None:
                return version, raw
        raise LocalFault(f"module {module} is not here", hint=_HINT)

    def _best(self, path: PathID, modules: tuple[ModuleID, ...]) -> Best | None:
        sizes = {module: self._log.num_parameters(module) for module in modules}
        best = read_best(self._paths / f"{path}{BEST_SUFFIX}", sizes)
        manifest = self._history.newest
        shard = stored_shard(self._store, manifest.shard(path).blob, manifest, path)
        if best is None or shard is None:
            return None
        rows = shard.valid[: manifest.run_config.rounds.eval_sequences]
        return best if best.is_on(rows) else None

    def _net(self, best: Best, model: ModelConfig) -> tuple[PathNet, int]:
        net = PathNet(model)
        for module, vector in best.parameters.items():
            write_module(net, self._history.newest.topology, module, vector)
        return net, best.round


_HINT = "a path is complete with the volunteer that trains it, and with the bootstrap node"
