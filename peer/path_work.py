"""The path that this peer trains: inner steps, outer gradients, and new versions put under them.

Training never waits for a round (unless the run is exact): at the end of a slot the outer gradient
is taken, and inner steps go on. When a new version arrives, the parameters become the new global
ones plus whatever progress the swarm has not counted yet. So nothing that was trained is lost, and
nothing is counted twice.
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from dipaco.checkpoint import ModuleState, write_atomically
from dipaco.compression import corrected, encode, lost
from dipaco.config import RunConfig
from dipaco.evaluate import Evaluation
from dipaco.inner import PathTrainer
from dipaco.moments import Moments
from dipaco.shards import Rows
from dipaco.tensors import decode_tensors, encode_tensors
from dipaco.topology import ModuleID

OPTIMIZER_SUFFIX, RESIDUAL_SUFFIX = ".optimizer", ".residuals"
PATHS_KEPT = 8  # with their optimizers' states, on disk: 8 bytes per parameter each
SLOTS_REMEMBERED = 3  # a slot's contribution may be counted by a certificate of a later slot


@dataclass(slots=True)
class _Base:
    """Where a module's progress is counted from."""

    version: int
    state: str  # digest
    parameters: Tensor
    tokens: int = 0  # trained since


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pending:
    """A contribution that was committed to, until a certificate says whether it counted."""

    slot: int
    parameters: Tensor  # when it was taken
    tokens: int
    residual: Callable[[], Tensor | None]  # what stays behind if it counts; takes a moment


@dataclass(frozen=True, kw_only=True, slots=True)
class Offer:
    """One module's outer gradient of one slot, encoded."""

    module: ModuleID
    base_version: int
    base_state: str
    tokens: int
    raw: bytes


class PathWork:
    """One path on one device, with the book-keeping of what the swarm has counted.

    Not thread-safe: the caller runs one method at a time, on any thread.
    """

    def __init__(self, trainer: PathTrainer, directory: Path) -> None:
        self.trainer = trainer
        self.last_loss: float | None = None
        self.train_seconds = 0.0
        self.handed_over: Moments | None = None  # taken up before the next step; set on any thread
        self._directory = directory
        self._bases: dict[ModuleID, _Base] = {}
        self._pending: dict[ModuleID, list[_Pending]] = {}
        self._residuals: dict[ModuleID, Tensor] = {}
        directory.mkdir(parents=True, exist_ok=True)
        self.resumed = trainer.load_optimizer(self._optimizer_file)
        trainer.seek(0)
        self._load_residuals()

    @property
    def round(self) -> int:
        """The round this path is in: the oldest version among its modules."""
        return min(base.version for base in self._bases.values())

    def version(self, module: ModuleID) -> int:
        """The version of a module that is under the path."""
        return self._bases[module].version

    @property
    def is_counted(self) -> bool:
        """Whether the versions under the path contain everything it was trained."""
        return all(base.tokens == 0 for base in self._bases.values())

    def begin(self, module: ModuleID, version: int, digest: str, state: ModuleState) -> None:
        """Put a module's current version under the path, before the first step."""
        self._bases[module] = _Base(version, digest, state.parameters)
        self.trainer.write_module(module, state.parameters)

    def go_on_after(
        self, counted: Mapping[ModuleID, int], *, rank: int, num_peers: int, under_way: int = 0
    ) -> None:
        """Find the place in the shard from which on nobody has trained this path yet.

        `counted`: tokens of the path in each module's certificates. What this peer has trained
        beyond that, each of the `num_peers` on the path has: they take the batches in turns, this
        one the `rank`-th. `under_way`: tokens that others have trained besides. A place that this
        peer has passed it does not go back to, so only work that is lost is left out.
        """
        trained = max(counted[m] + num_peers * base.tokens for m, base in self._bases.items())
        number = round((trained + under_way) / self.trainer.tokens_per_step) + rank
        self.trainer.seek(max(number, self.trainer.next_batch_number), stride=num_peers)

    def change_trainer(self, make: Callable[[], PathTrainer]) -> None:
        """Go on with another trainer of the same path; what it was trained stays.

        The old one is let go before the new one is made, since a device may have no room for two.
        The optimizer's state goes along, if the new trainer takes it.
        """
        self.save()
        parameters = {module: self.trainer.read_module(module) for module in self._bases}
        number = self.trainer.next_batch_number
        del self.trainer
        self.trainer = make()
        self.trainer.load_optimizer(self._optimizer_file)
        self.trainer.seek(number)
        for module, vector in parameters.items():
            self.trainer.write_module(module, vector)

    def train(self, *, seconds: float, max_steps: int, first_step: int) -> int:
        """Take inner steps for about `seconds` (at least one), `max_steps` at most.

        `first_step` is the number of steps taken in this slot already; beyond the schedule's
        `inner_steps` the learning rate stays where it is. Returns the number of steps.
        """
        inner_steps = self.trainer.config.rounds.inner_steps
        start = time.monotonic()
        moments, self.handed_over = self.handed_over, None
        if moments is not None:
            self.trainer.take_over(moments)
        steps = 0
        loss: Tensor | None = None
        while steps < max_steps and (steps == 0 or time.monotonic() - start < seconds):
            step = min(first_step + steps, inner_steps)
            loss = self.trainer.train_step(self.round * inner_steps + step)
            steps += 1
        if loss is not None:
            self.last_loss = float(loss)  # waits for the device, so that the time below is honest
        for base in self._bases.values():
            base.tokens += steps * self.trainer.tokens_per_step
        self.train_seconds += time.monotonic() - start
        return steps

    def offers(
        self, slot: int, config: RunConfig, modules: Iterable[ModuleID] | None = None
    ) -> list[Offer]:
        """Take the outer gradient (old minus new) of every module that was trained, encoded.

        `config` is the one in force in `slot`; of these `modules` only, or of all.
        """
        offers = []
        for module in self._bases if modules is None else modules:
            base = self._bases[module]
            if base.tokens == 0 or base.version >= config.rounds.num_rounds:
                continue
            parameters = self.trainer.read_module(module)
            wire_format = config.outer.wire_format
            vector = corrected(base.parameters - parameters, self._residuals.get(module))
            raw = encode(vector, wire_format)
            pending = _Pending(
                slot=slot,
                parameters=parameters,
                tokens=base.tokens,
                residual=partial(lost, vector, raw, wire_format),
            )
            earlier = self._pending.get(module, [])
            self._pending[module] = [*earlier, pending][-SLOTS_REMEMBERED:]
            offers.append(
                Offer(
                    module=module,
                    base_version=base.version,
                    base_state=base.state,
                    tokens=base.tokens,
                    raw=raw,
                )
            )
        return offers

    def rebase(
        self,
        module: ModuleID,
        version: int,
        digest: str,
        state: ModuleState,
        *,
        counted: int | None,
    ) -> None:
        """Put a new version under the path.

        `counted` is the slot of our contribution that the version contains, or None. What it
        counted is in the new version; the progress since then, or all of it, stays on top.
        """
        base = self._bases[module]
        if version <= base.version:
            return
        offered = [p for p in self._pending.pop(module, []) if p.slot == counted]
        since, tokens = base.parameters, base.tokens
        if offered:
            since, tokens = offered[0].parameters, base.tokens - offered[0].tokens
            self._residuals.pop(module, None)
            residual = offered[0].residual()
            if residual is not None:
                self._residuals[module] = residual
        parameters = state.parameters
        if tokens:
            parameters = parameters + (self.trainer.read_module(module) - since)
        self.trainer.write_module(module, parameters)
        self._bases[module] = _Base(version, digest, state.parameters, tokens)

    def evaluate(self) -> Evaluation:
        """The path as it stands, on the validation part of its shard."""
        return self.trainer.evaluate(self.trainer.config.rounds.eval_sequences)

    def score(self, rows: Rows, *, seconds: float, max_batches: int) -> Tensor:
        """How well the path as it stands predicts the first of `rows` (`PathTrainer.score_rows`).

        For about `seconds`, at least one batch and at most `max_batches`; one score per row.
        """
        size = self.trainer.config.inner.batch_sequences
        start = time.monotonic()
        parts: list[Tensor] = []
        for first in range(0, min(len(rows), max_batches * size), size):
            parts.append(self.trainer.score_rows(rows[first : first + size]))
            if time.monotonic() - start >= seconds:
                break
        return torch.cat(parts)

    def save(self) -> None:
        """Keep the optimizer's state and the residuals for the next start on this path."""
        self.trainer.save_optimizer(self._optimizer_file)
        tensors = {str(module): residual for module, residual in self._residuals.items()}
        if tensors:
            write_atomically(self._residual_file, encode_tensors(tensors))
        drop_oldest(self._directory, max_paths=PATHS_KEPT)

    @property
    def _optimizer_file(self) -> Path:
        return self._directory / f"{self.trainer.path}{OPTIMIZER_SUFFIX}"

    @property
    def _residual_file(self) -> Path:
        return self._directory / f"{self.trainer.path}{RESIDUAL_SUFFIX}"

    def _load_residuals(self) -> None:
        """What earlier rounds lost in compression; a missing or damaged file loses just that."""
        layout = {
            str(module): (torch.float32, (self.trainer.read_module(module).numel(),))
            for module in self.trainer.modules
        }
        try:
            tensors: Mapping[str, Tensor] = decode_tensors(self._residual_file.read_bytes(), layout)
        except (OSError, ValueError):
            return
        self._residuals = {ModuleID.parse(name): tensor for name, tensor in tensors.items()}


def drop_oldest(directory: Path, *, max_paths: int, max_bytes: float = math.inf) -> None:
    """Delete what is kept of the paths that were trained longest ago.

    At most `max_paths` remain, of at most `max_bytes` in all; the one trained last always does.
    """
    by_path: dict[str, list[Path]] = {}
    for file in directory.iterdir():
        if file.suffix in (OPTIMIZER_SUFFIX, RESIDUAL_SUFFIX):
            by_path.setdefault(file.stem, []).append(file)
    newest_first = sorted(
        by_path.values(), key=lambda files: max(f.stat().st_mtime_ns for f in files), reverse=True
    )
    room_bytes = max_bytes
    for number, files in enumerate(newest_first):
        room_bytes -= sum(file.stat().st_size for file in files)
        if number > 0 and (number >= max_paths or room_bytes < 0):
            for file in files:
                file.unlink(missing_ok=True)
