"""The path that this peer trains: inner steps, outer gradients, and new versions put under them.

Training never waits for a round (unless the run is exact): at the end of a slot the outer gradient
is taken, and inner steps go on. When a new version arrives, the parameters become the new global
ones plus whatever progress the swarm has not counted yet. So nothing that was trained is lost, and
nothing is counted twice.

Whatever takes longer than copying the parameters is done on copies, while training goes on: a
`Draft` encodes an outer gradient, a `Rebasing` works out by how much a new version moves the path.
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from dipaco.checkpoint import ModuleState, write_tensors
from dipaco.config import RunConfig
from dipaco.early_stopping import keep_if_best
from dipaco.evaluate import Evaluation
from dipaco.inner import PathTrainer
from dipaco.moments import Moments
from dipaco.shards import Rows
from dipaco.tensors import decode_tensors, is_finite, layout_of, new_vector
from dipaco.topology import ModuleID
from peer.draft import Base, Draft
from peer.path_files import (
    BEST_SUFFIX,
    OPTIMIZER_SUFFIX,
    PATHS_KEPT,
    RESIDUAL_SUFFIX,
    drop_oldest,
)

DRAFTS_REMEMBERED = 3  # the first since the last version, and the last two


@dataclass(frozen=True, kw_only=True, slots=True)
class Rebasing:
    """What a new version makes of one module of a path."""

    module: ModuleID
    version: int
    state: str  # digest
    parameters: Tensor  # of the version
    change: Tensor  # to the path's parameters, which keeps what was trained since
    blob: str | None  # our contribution that is in the version
    counted: Draft | None  # which that is of; None if it is not remembered
    residual: Tensor | None  # instead of the one there is, if something was counted


class PathWork:
    """One path on one device, with the book-keeping of what the swarm has counted.

    Not thread-safe: the caller runs one method at a time, on any thread. Those that say "beside
    training" may run at the same time as the others.
    """

    def __init__(
        self, trainer: PathTrainer, directory: Path, *, paths_kept: int = PATHS_KEPT
    ) -> None:
        self.trainer = trainer
        self.last_loss: float | None = None
        self.train_seconds = 0.0
        self.num_divergences = 0  # times that training came to a loss which is not finite
        self.handed_over: Moments | None = None  # taken up before the next step; set on any thread
        self._directory = directory
        self._paths_kept = paths_kept
        self._bases: dict[ModuleID, Base] = {}
        self._pending: dict[ModuleID, list[Draft]] = {}
        self._forgotten: dict[ModuleID, set[str]] = {}  # blobs of drafts that were pending
        self._residuals: dict[ModuleID, Tensor] = {}
        directory.mkdir(parents=True, exist_ok=True)
        self.resumed = trainer.load_optimizer(self._file(OPTIMIZER_SUFFIX))
        trainer.seek(0)
        self._load_residuals()

    @property
    def round(self) -> int:
        """The round this path is in: the oldest version among its modules."""
        return min(base.version for base in self._bases.values())

    def version(self, module: ModuleID) -> int:
        """The version of a module that is under the path."""
        return self._bases[module].version

    def is_new(self, module: ModuleID, version: int, state: str) -> bool:
        """Whether a version that is held, of that digest, is not the one under the path yet.

        It may be of the same number: then the one under the path lost a fork. None is older.
        """
        base = self._bases[module]
        return version > base.version or (version == base.version and state != base.state)

    @property
    def is_counted(self) -> bool:
        """Whether the versions under the path contain everything it was trained."""
        return all(base.tokens == 0 for base in self._bases.values())

    def begin(self, module: ModuleID, version: int, digest: str, state: ModuleState) -> None:
        """Put a module's current version under the path, before the first step."""
        self._bases[module] = Base(version, digest, state.parameters)
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
        The optimizer's state goes along as it was saved last, if the new trainer takes it.
        """
        parameters = {module: self.trainer.read_module(module) for module in self._bases}
        number = self.trainer.next_batch_number
        del self.trainer
        self.trainer = make()
        self.trainer.load_optimizer(self._file(OPTIMIZER_SUFFIX))
        self.trainer.seek(number)
        for module, vector in parameters.items():
            self.trainer.write_module(module, vector)

    def let_go(self) -> None:
        """Free the device; nothing can be trained any more."""
        del self.trainer

    def train(self, *, seconds: float, max_steps: int, first_step: int) -> int:
        """Take inner steps for about `seconds` (at least one), `max_steps` at most.

        `first_step` is the number of steps taken in this slot already; beyond the schedule's
        `inner_steps` the learning rate stays where it is. Returns the number of steps.

        When the loss is not finite any more, the path starts over from the versions under it: what
        it was trained since nobody could count. An exact run has no second try, and ends.

        A module that is finished is put back: the others are trained for what it is in the end.
        """
        inner_steps = self.trainer.config.rounds.inner_steps
        start = time.monotonic()
        moments, self.handed_over = self.handed_over, None
        if moments is not None:
            self.trainer.take_over(moments)
        steps = 0
        loss: Tensor | None = None
        finished = {m: base for m, base in self._bases.items() if self._is_finished(base.version)}
        while steps < max_steps and (steps == 0 or time.monotonic() - start < seconds):
            step = min(first_step + steps, inner_steps)
            loss = self.trainer.train_step(self.round * inner_steps + step)
            for module, base in finished.items():
                self.trainer.write_module(module, base.parameters)
            steps += 1
        if loss is not None:
            self.last_loss = float(loss)  # waits for the device, so that the time below is honest
        for module, base in self._bases.items():
            if module not in finished:
                base.tokens += steps * self.trainer.tokens_per_step
        if not math.isfinite(self.last_loss or 0.0) and not self.trainer.config.rounds.blocking:
            self._start_over()
        self.train_seconds += time.monotonic() - start
        return steps

    def _is_finished(self, version: int) -> bool:
        """Whether a module has its last version: no other one counts what is trained on top."""
        return version >= self.trainer.config.rounds.num_rounds

    def _start_over(self) -> None:
        self.num_divergences += 1
        self._pending.clear()
        self._forgotten.clear()
        self._residuals.clear()
        self._file(RESIDUAL_SUFFIX).unlink(missing_ok=True)
        self.trainer.forget()
        for module, base in self._bases.items():
            base.tokens = 0
            self.trainer.write_module(module, base.parameters)

    def drafts(self, config: RunConfig, modules: Iterable[ModuleID] | None = None) -> list[Draft]:
        """Take the progress of every module that was trained, to be encoded.

        `config` is the one in force in the slot; of these `modules` only, or of all. Those of
        before must have been encoded.
        """
        drafts = []
        for module in self._bases if modules is None else modules:
            base = self._bases[module]
            if base.tokens == 0 or base.version >= config.rounds.num_rounds:
                continue
            draft = Draft(
                module,
                base,
                self.trainer.read_module(module),
                self._residuals.get(module),
                config.outer.wire_format,
            )
            # Where versions do not get here, the first is counted; where there are none, the last.
            pending = [*self._pending.get(module, []), draft]
            if len(pending) > DRAFTS_REMEMBERED:
                self._forgotten.setdefault(module, set()).add(pending.pop(1).blob)
            self._pending[module] = pending
            drafts.append(draft)
        return drafts

    def rebasing(
        self,
        module: ModuleID,
        version: int,
        digest: str,
        state: ModuleState,
        *,
        counted: str | None,
    ) -> Rebasing:
        """What putting a new version under the path comes to; beside training.

        `counted` is the blob of our contribution that the version contains, or None. What it
        counted is in the new version; the progress since then, or all of it, stays on top.

        If the log lost a fork, the version is of another history than the one under the path, or
        than the one that was prepared for. The rule is the same: `counted` is what the winner's
        certificates say, never the loser's. Drafts that are pending name the state under the path.
        If the histories part there, the winner may count one of them; what only the loser counts
        stays on top. If they part before, it counts none, and all that is on top stays there. What
        the path was rebased for is no longer on top: it is lost with the history that counted it,
        and neither added nor subtracted here.

        If a draft was counted that is forgotten, nobody knows what of the progress is not in the
        version: all of it is given up, since nothing may be counted twice.
        """
        drafts = self._pending.get(module, [])
        draft = next((draft for draft in drafts if draft.blob == counted), None)
        since = self._bases[module].parameters if draft is None else draft.parameters
        return Rebasing(
            module=module,
            version=version,
            state=digest,
            parameters=state.parameters,
            change=torch.sub(state.parameters, since, out=new_vector(len(since))),
            blob=counted,
            counted=draft,
            residual=None if draft is None else draft.lost(),
        )

    def rebase(self, step: Rebasing) -> None:
        """Put a new version under the path: one pass over the parameters."""
        module, base = step.module, self._bases[step.module]
        if not self.is_new(module, step.version, step.state):
            return
        is_forgotten = step.blob in self._forgotten.get(module, ())
        is_pending = step.counted in self._pending.get(module, [])
        if step.counted is not None and not (is_pending or is_forgotten):  # started over since
            change = torch.sub(step.parameters, base.parameters)
            step = replace(step, counted=None, residual=None, change=change)
        tokens = base.tokens
        if step.counted is not None or is_forgotten:
            tokens = 0 if step.counted is None else tokens - step.counted.tokens
            if step.residual is None:
                self._residuals.pop(module, None)
            else:
                self._residuals[module] = step.residual
        if self._is_finished(step.version):
            tokens = 0
        self._pending.pop(module, None)
        self._forgotten.pop(module, None)
        if tokens:
            self.trainer.add_to_module(module, step.change)
        else:
            self.trainer.write_module(module, step.parameters)  # the same, without rounding
        self._bases[module] = Base(step.version, step.state, step.parameters, tokens)

    def evaluate(self) -> tuple[Evaluation, Callable[[], object]]:
        """The versions under the path, on the validation part of its shard; beside training.

        What is returned with that keeps them on the disk if none did better, on any thread.
        """
        bases = dict(self._bases)
        versions = {module: base.parameters for module, base in bases.items()}
        rows = self.trainer.valid_rows(self.trainer.config.rounds.eval_sequences)
        evaluation = self.trainer.evaluate_modules(versions, rows)
        keep = partial(
            keep_if_best,
            self._file(BEST_SUFFIX),
            versions,
            evaluation,
            rows=rows,
            round_number=min(base.version for base in bases.values()),
        )
        return evaluation, keep

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
        """Keep the optimizer's state and the residuals for the next start on this path.

        Beside training: then some moments are of one step and some of the next, which AdamW does
        not mind.
        """
        self.trainer.save_optimizer(self._file(OPTIMIZER_SUFFIX))
        tensors = {str(module): residual for module, residual in self._left_behind().items()}
        if tensors:
            write_tensors(self._file(RESIDUAL_SUFFIX), tensors)
        else:
            self._file(RESIDUAL_SUFFIX).unlink(missing_ok=True)
        drop_oldest(self._directory, max_paths=self._paths_kept)

    def _left_behind(self) -> dict[ModuleID, Tensor]:
        """The residuals for the next start on this path.

        The one that a draft contains has been sent with it, so what is left is what the draft
        lost. If it is not counted in the end, its progress is lost by the new start anyway.
        """
        pending = dict(self._pending)  # first: what `rebase` takes from it is a residual by then
        residuals: dict[ModuleID, Tensor | None] = dict(self._residuals)
        for module, drafts in pending.items():
            encoded = [draft for draft in drafts if draft.blob]
            if encoded:
                residuals[module] = encoded[-1].lost()
        return {module: one for module, one in residuals.items() if one is not None}

    def _file(self, suffix: str) -> Path:
        return self._directory / f"{self.trainer.path}{suffix}"

    def _load_residuals(self) -> None:
        """What earlier rounds lost in compression; what is missing or damaged loses just that."""
        try:
            raw = self._file(RESIDUAL_SUFFIX).read_bytes()
            tensors = decode_tensors(raw, layout_of(raw))
        except (OSError, ValueError):
            return
        for module in self.trainer.modules:
            residual, vector = tensors.get(str(module)), self.trainer.read_module(module)
            if residual is None or (residual.dtype, residual.shape) != (vector.dtype, vector.shape):
                continue
            if is_finite(residual):  # else nothing that contains it would ever be counted
                self._residuals[module] = residual
