"""The inner loop of one path on one device (paper Algorithm 1, lines 5 to 8).

What batches a path has, and in which order, follows from the run's seed and the path, nothing else;
who trains it says where in that order it is. With float32 on the CPU and one number of threads, the
same steps therefore give the same bits.
"""

# ruff: noqa: N803, N806 - tensors carry their shape in their name

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dipaco.batches import Batches, step_inputs
from dipaco.checkpoint import write_tensors
from dipaco.config import RunConfig
from dipaco.device import autocast
from dipaco.evaluate import IGNORED, NOTHING, Evaluation, evaluate, token_nll
from dipaco.footprint import LOGITS_AT_ONCE
from dipaco.model import PathNet, add_to_module, read_module, write_module
from dipaco.moments import Moments
from dipaco.optimizer import (
    OptimizerName,
    learning_rate,
    new_optimizer,
    optimizer_state,
    optimizer_tensors,
)
from dipaco.recorded import RecordedStep
from dipaco.shards import Rows, Shard
from dipaco.topology import ModuleID, PathID, Topology

_SCORE_ROWS = 256  # moved to the device at a time


class PathTrainer:
    """Trains one path on one device. Not for two threads at once, but for any thread.

    Modules must be written before the first step. On a GPU the network runs in bfloat16
    autocast over float32 parameters, and with AdamW of 32 bits a step is recorded and replayed. A
    `compiled` one trains through `torch.compile`: the first step of a process takes seconds to
    minutes, those after it less, and the last bits may differ.
    """

    def __init__(  # noqa: PLR0913 - what to train, then on what
        self,
        config: RunConfig,
        topology: Topology,
        path: PathID,
        shard: Shard,
        *,
        device: torch.device | str = "cpu",
        optimizer: OptimizerName = "adamw",
        compiled: bool = False,
    ) -> None:
        self.config = config
        self.topology = topology
        self.path = path
        self.modules = topology.modules_of(path)
        self.device = torch.device(device)
        self.net = PathNet(config.model, self.device)
        # Only for training, all of whose batches have one shape: every other costs a compilation.
        self._hidden = (
            torch.compile(self.net.hidden, dynamic=False) if compiled else self.net.hidden
        )
        self.num_steps = 0
        """Steps this optimizer has taken since it was new."""
        self.next_batch_number = 0
        """In the order of the path's batches; see `seek`."""
        self._stride = 1
        self._shard = shard
        self._batches = Batches(
            shard.train,
            batch_sequences=config.inner.batch_sequences,
            seed=config.seed,
            path=path,
        )
        self._parameters = list(self.net.parameters())
        self.optimizer_name = optimizer
        self._optimizer = new_optimizer(self.net, optimizer, config.inner)
        self._recorded = self._recording()
        self._loss = torch.zeros(())
        self._identity = f"{optimizer} {path} {config.model}"
        self._prefix_tokens = 1 if config.inner.train_on_prefix else config.routing.prefix_tokens

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one inner step as contributions count them: padding included."""
        return self.config.inner.batch_sequences * self.config.model.sequence_tokens

    def write_module(self, module: ModuleID, vector: Tensor) -> None:
        """Set the parameters of one of the path's modules; the optimizer's state stays."""
        self._require(module)
        write_module(self.net, self.topology, module, vector)

    def add_to_module(self, module: ModuleID, change: Tensor) -> None:
        """Add a flat vector to the parameters of one of the path's modules, in place."""
        self._require(module)
        add_to_module(self.net, self.topology, module, change)

    def read_module(self, module: ModuleID) -> Tensor:
        """The parameters of one of the path's modules: a new float32 vector on the CPU."""
        self._require(module)
        return read_module(self.net, self.topology, module)

    def seek(self, number: int, *, stride: int = 1) -> None:
        """Go on with batch `number` of the path, then with every `stride`-th one after it.

        So several that train one path share its batches out. Without this, a trainer takes one
        batch after another, by the steps of its optimizer.
        """
        self.next_batch_number = number
        self._stride = stride

    def train_step(self, position_steps: int) -> Tensor:
        """One inner step; returns the mean loss (nats per token) as a detached 0-d tensor.

        Does not wait for the device: reading the loss does.
        """
        self.begin_step(position_steps)
        return self.end_step()

    def begin_step(self, position_steps: int) -> None:
        """Start an inner step. What others have begun on the same GPU runs beside it."""
        lr = learning_rate(
            self.config.inner,
            position_steps=position_steps,
            total_steps=self.config.rounds.total_steps,
            fresh_steps=self.num_steps,
        )
        inputs = step_inputs(
            self.next_batch(),
            prefix_tokens=self._prefix_tokens,
            pad=self.config.model.pad_token,
            fill_up=self._recorded is not None,
        )
        if self._recorded is not None:
            self._recorded.begin(self._step, (*inputs, torch.tensor(lr)))
        else:
            tokens_BT, positions_N, targets_N = (
                value.to(self.device, non_blocking=True) for value in inputs
            )
            self._loss = self._step(tokens_BT, positions_N, targets_N, lr)
        self.num_steps += 1
        self.next_batch_number += self._stride

    def end_step(self) -> Tensor:
        """The loss of the step that was begun, as `train_step` returns it."""
        return self._loss if self._recorded is None else self._recorded.end()

    def next_batch(self) -> Tensor:
        """Tokens [B, T] of the step to come, on the CPU."""
        return self._batches.batch(self.next_batch_number)

    def evaluate(self, max_sequences: int) -> Evaluation:
        """Score at most `max_sequences` of the shard's validation rows."""
        return self.evaluate_rows(self.valid_rows(max_sequences))

    def valid_rows(self, max_sequences: int) -> Rows:
        """At most `max_sequences` of the shard's validation rows."""
        return self._shard.valid[:max_sequences]

    def evaluate_modules(self, vectors: Mapping[ModuleID, Tensor], rows: Rows) -> Evaluation:
        """Score any rows with these parameters, in a network of its own, so that training may go
        on meanwhile: on any thread.
        """
        net = PathNet(self.config.model, self.device)
        for module, vector in vectors.items():
            write_module(net, self.topology, module, vector)
        return self._evaluate(net, rows)

    def evaluate_rows(self, rows: Rows) -> Evaluation:
        """Score any rows [n, T]."""
        return self._evaluate(self.net, rows)

    def _evaluate(self, net: PathNet, rows: Rows) -> Evaluation:
        if not len(rows):
            return NOTHING
        return evaluate(
            net,
            torch.from_numpy(rows.astype(np.int64)).to(self.device),
            prefix_tokens=self.config.routing.prefix_tokens,
            model=self.config.model,
        )

    def score_rows(self, rows: Rows) -> Tensor:
        """Log-likelihood [n] (nats, float32, on the CPU) of each row's tokens after the prefix."""
        parts = [torch.empty(0)]
        for start in range(0, len(rows), _SCORE_ROWS):
            tokens = torch.from_numpy(rows[start : start + _SCORE_ROWS].astype(np.int64))
            nll_BT = token_nll(
                self.net,
                tokens.to(self.device),
                prefix_tokens=self.config.routing.prefix_tokens,
                model=self.config.model,
            )
            parts.append(-nll_BT.sum(dim=1))
        return torch.cat(parts)

    def save_optimizer(self, file: Path, *, flush: bool = True) -> None:
        """Write the optimizer's state and step count, whole or not at all (see `replacing`)."""
        tensors = optimizer_tensors(
            self._optimizer, self._parameters, identity=self._identity, num_steps=self.num_steps
        )
        write_tensors(file, tensors, flush=flush)

    def load_optimizer(self, file: Path) -> bool:
        """Continue where `save_optimizer` left off; False, and no change, if that cannot be.

        The file may be absent, damaged, or of another model, path or optimizer.
        """
        try:
            num_steps, state = optimizer_state(
                file.read_bytes(), self._parameters, identity=self._identity
            )
        except (OSError, ValueError, LookupError):
            return False
        for parameter, entries in zip(self._parameters, state, strict=True):
            self._optimizer.state[parameter] = entries
        self._recorded = self._recording()
        self.num_steps = num_steps
        self.seek(num_steps)
        return True

    def take_over(self, moments: Moments) -> None:
        """Continue with what another peer's optimizer has learnt of this path's gradients.

        Only for 32-bit AdamW: an 8-bit one has a form of its own.
        """
        assert self.optimizer_name == "adamw", "checked by the caller"
        sizes = [parameter.numel() for parameter in self._parameters]
        parts = (torch.split(vector, sizes) for vector in (moments.mean, moments.mean_square))
        for parameter, mean, mean_square in zip(self._parameters, *parts, strict=True):
            self._optimizer.state[parameter] = {
                "step": torch.tensor(float(moments.num_steps), device=self.device),
                "exp_avg": mean.reshape(parameter.shape).to(self.device),
                "exp_avg_sq": mean_square.reshape(parameter.shape).to(self.device),
            }
        self._recorded = self._recording()
        self.num_steps = moments.num_steps

    def forget(self) -> None:
        """Go on with an optimizer that has learnt nothing yet."""
        self._optimizer = new_optimizer(self.net, self.optimizer_name, self.config.inner)
        self._recorded = self._recording()
        self.num_steps = 0

    def _require(self, module: ModuleID) -> None:
        if module not in self.modules:
            raise ValueError(f"module {module} is not on path {self.path}")

    def _recording(self) -> RecordedStep | None:
        """For the optimizer's state as it is now; None where steps cannot be recorded."""
        if self.device.type == "cuda" and self.optimizer_name == "adamw":
            return RecordedStep(self.device)
        return None

    def _step(
        self, tokens_BT: Tensor, positions_N: Tensor, targets_N: Tensor, lr: Tensor | float
    ) -> Tensor:
        """The step itself, with `StepInputs` on the device; returns the mean loss."""
        with autocast(self.device):
            hidden_BTD = self._hidden(tokens_BT)
        hidden_ND = hidden_BTD.flatten(0, 1).index_select(0, positions_N)
        loss, gradient_ND = self._backward_head(hidden_ND.detach(), targets_N)
        hidden_ND.backward(gradient_ND)  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self._parameters, self.config.inner.gradient_clip_norm)
        is_recording = self._recorded is not None and torch.cuda.is_current_stream_capturing()
        for group in self._optimizer.param_groups:
            group["lr"] = lr
            group["capturable"] = is_recording  # what AdamW wants, and warns of elsewhere
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return loss

    def _backward_head(self, hidden_ND: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
        """The mean loss (nats per token, 0-d) of hidden states [N, D] of the last block, and its
        gradient [N, D] by them; that by the head's parameters is added to what these have.

        Logits are by far the largest tensor of a step, so they are turned into their gradients in
        place, some rows at a time.
        """
        num_rows = -(-LOGITS_AT_ONCE[self.device.type] // self.config.model.vocab_size)
        is_counted_N = targets_N != IGNORED
        shares_N = is_counted_N / is_counted_N.sum().clamp(min=1)
        loss = torch.zeros((), device=self.device)
        gradients = []
        for rows_ND, labels_N, some_shares_N in zip(
            torch.split(hidden_ND, num_rows),
            torch.split(targets_N.clamp(min=0), num_rows),
            torch.split(shares_N, num_rows),
            strict=True,
        ):
            rows_ND.requires_grad_()
            with autocast(self.device):
                logits_NV = self.net.logits(rows_ND)
            log_p_NV = logits_NV.detach().log_softmax(1, dtype=torch.float32)
            loss -= (log_p_NV.gather(1, labels_N[:, None]).squeeze(1) * some_shares_N).sum()
            # The gradient of the loss: the probabilities, less one at the target.
            gradient_NV = log_p_NV.exp_()
            gradient_NV.scatter_add_(1, labels_N[:, None], -torch.ones_like(some_shares_N)[:, None])
            gradient_NV *= some_shares_N[:, None]
            logits_NV.backward(gradient_NV.to(logits_NV.dtype))  # type: ignore[no-untyped-call]
            assert rows_ND.grad is not None
            gradients.append(rows_ND.grad)
        return loss, torch.cat(gradients)
