"""Choosing the path at any token, for re-routing at test time (paper 2.4.3, 7.2.2).

The dense start, fine-tuned to say after each token which path will predict the rest of the
sequence best. It learns that from router data, which every path has scored.
"""

# ruff: noqa: N803, N806 - tensors carry their shape in their name: B or N sequences, T tokens,
# P paths, C chunks

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from dipaco.config import RunConfig
from dipaco.device import autocast
from dipaco.errors import BadBytes, ConfigError
from dipaco.evaluate import IGNORED
from dipaco.model import PathNet
from dipaco.optimizer import learning_rate, new_optimizer
from dipaco.shards import Rows
from dipaco.tensors import Layout, decode_tensors, encode_tensors

_NUM_EVALUATIONS = 20  # at most; after each the parameters are kept if they are the best so far
_HELD_OUT_RUN = 10  # of so many runs of neighbouring rows, the last one is held out
_MAX_RUNS = 100
_BATCH_TOKENS = 2**14  # scored at a time

Labels = NDArray[np.int32]
"""The best path [N, T] for the tokens after each one; IGNORED where none of them counts."""


class TokenRouter(nn.Module):
    """A network with one output per path at each token. Parameters are uninitialized.

    `round` is the one after which it was trained: the paths may have changed since.
    """

    round: Tensor

    def __init__(self, config: RunConfig, device: torch.device | str = "cpu") -> None:
        super().__init__()
        # As if tied, because it needs no head for tokens.
        self.net = PathNet(replace(config.model, tied_embedding=True), device)
        self.head = nn.Linear(
            config.model.width, config.topology.num_paths, bias=False, device=device
        )
        self.register_buffer("round", torch.zeros((), dtype=torch.int64, device=device))

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Logits [B, T, P] of the path to take after each token."""
        with autocast(tokens_BT.device):
            logits_BTP: Tensor = self.head(self.net.model.norm(self.net.hidden(tokens_BT)))
        return logits_BTP.float()

    @torch.no_grad()
    def choose(self, rows: Rows, boundaries: Sequence[int]) -> NDArray[np.int64]:
        """The path number [N, C] for the tokens from each boundary on, by the tokens before it.

        ValueError if there is none before it.
        """
        if min(boundaries, default=1) < 1:
            raise ValueError("a path is chosen by the tokens before a boundary")
        chosen = np.empty((len(rows), len(boundaries)), dtype=np.int64)
        for part in self._parts(rows):
            logits_BTP = self(self.tokens_of(rows[part]))
            last_BCP = logits_BTP[:, [boundary - 1 for boundary in boundaries]]
            chosen[part] = last_BCP.argmax(dim=2).cpu().numpy()
        return chosen

    def next_path(self, tokens: Sequence[int]) -> int:
        """The path number for what follows `tokens`, of which there must be one or more."""
        seen = tokens[-self.net.config.sequence_tokens :]
        return int(self.choose(np.array([seen], dtype=np.uint16), [len(seen)])[0, 0])

    @torch.no_grad()
    def loss(self, rows: Rows, labels_NT: Labels) -> float:
        """Mean cross-entropy (nats) over the labels that count."""
        parts = self._parts(rows)
        total = sum(float(self.loss_sum(rows[part], labels_NT[part])) for part in parts)
        return total / max(1, num_counted(labels_NT))

    def loss_sum(self, rows: Rows, labels_BT: Labels) -> Tensor:
        """Summed cross-entropy (nats) of one batch."""
        logits_BTP = self(self.tokens_of(rows))
        targets_BT = torch.from_numpy(labels_BT.astype(np.int64)).to(logits_BTP.device)
        return F.cross_entropy(
            logits_BTP.flatten(0, 1),
            targets_BT.flatten(),
            ignore_index=IGNORED,
            reduction="sum",
        )

    def tokens_of(self, rows: Rows) -> Tensor:
        """Rows as tokens [B, T] on the router's device."""
        return torch.from_numpy(rows.astype(np.int64)).to(self.head.weight.device)

    def to_bytes(self) -> bytes:
        """All parameters, and the round, as safetensors."""
        return encode_tensors({name: value.cpu() for name, value in self.state_dict().items()})

    @classmethod
    def from_bytes(cls, raw: bytes | memoryview, config: RunConfig) -> "TokenRouter":
        """The inverse of `to_bytes`; BadBytes if it is not a token-level router of this run."""
        router = cls(config)
        layout: Layout = {
            name: (value.dtype, tuple(value.shape)) for name, value in router.state_dict().items()
        }
        try:
            tensors = decode_tensors(raw, layout)
        except ValueError as error:
            raise BadBytes(f"not the token-level router of this run: {error}") from error
        if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
            raise BadBytes("not the token-level router of this run: a value is not finite")
        router.load_state_dict(tensors)
        return router

    def _parts(self, rows: Rows) -> Iterator[slice]:
        num_rows = max(1, _BATCH_TOKENS // rows.shape[1])
        return (slice(start, start + num_rows) for start in range(0, len(rows), num_rows))


def train_token_router(
    net: PathNet,
    rows: Rows,
    labels_NT: Labels,
    *,
    config: RunConfig,
    num_steps: int,
    on_progress: Callable[[int, int], None],
) -> TokenRouter:
    """Fine-tune a copy of `net`, on its device, to say the labels; `on_progress(done, total)`.

    A tenth of the rows is held out, and the parameters that do best on it are kept. ConfigError if
    there are fewer than ten rows.
    """
    if len(rows) < _HELD_OUT_RUN:
        raise ConfigError(
            f"router data of {len(rows)} sequences is too little",
            hint="raise routing.router_fraction or corpus.max_documents",
        )
    is_held_out_N = held_out(len(rows))
    held_rows, held_labels = rows[is_held_out_N], labels_NT[is_held_out_N]
    device = net.model.embed_tokens.weight.device
    router = TokenRouter(config, device)
    router.net.model.load_state_dict(net.model.state_dict())
    nn.init.zeros_(router.head.weight)
    optimizer = new_optimizer(router, "adamw", config.inner)
    schedule = replace(config.inner, warmup_steps=0)
    generator = np.random.default_rng(config.seed)
    interval = max(1, num_steps // _NUM_EVALUATIONS)
    best_loss, best = router.loss(held_rows, held_labels), router.to_bytes()
    for step in range(num_steps):
        rate = learning_rate(schedule, position_steps=step, total_steps=num_steps, fresh_steps=step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = generator.choice(np.flatnonzero(~is_held_out_N), config.inner.batch_sequences)
        loss_sum = router.loss_sum(rows[batch], labels_NT[batch])
        loss = loss_sum / max(1, num_counted(labels_NT[batch]))
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(router.parameters(), config.inner.gradient_clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % interval == 0 or step + 1 == num_steps:
            held_loss = router.loss(held_rows, held_labels)
            if held_loss < best_loss:
                best_loss, best = held_loss, router.to_bytes()
        on_progress(step + 1, num_steps)
    return TokenRouter.from_bytes(best, config).to(device)


class BestPaths:
    """What the router shall say after each token: the path with the best sum over all later ones.

    The scores of one path come after those of another, and are not kept: with any number of paths
    this takes 13 bytes for each token.
    """

    def __init__(self, num_rows: int, num_tokens: int) -> None:
        shape = (num_rows, num_tokens - 1)  # nothing comes after the last token
        self._best_NT = np.full(shape, -np.inf)
        self._paths_NT = np.zeros(shape, dtype=np.int32)
        self._counts_NT = np.zeros(shape, dtype=np.bool_)

    def add(self, number: int, rows: slice, scores_BT: NDArray[np.float32]) -> None:
        """The log-likelihood of each token of some rows under a path, given the tokens before; 0
        where it does not count. Of equally good paths the first one that is added counts.
        """
        later_BT = scores_BT[:, :0:-1].cumsum(axis=1, dtype=np.float64)[:, ::-1]
        is_better_BT = later_BT > self._best_NT[rows]
        self._best_NT[rows][is_better_BT] = later_BT[is_better_BT]
        self._paths_NT[rows][is_better_BT] = number
        self._counts_NT[rows] |= later_BT != 0

    def labels(self) -> Labels:
        """The best of the paths that were added."""
        counted_NT = np.where(self._counts_NT, self._paths_NT, IGNORED).astype(np.int32)
        return np.pad(counted_NT, ((0, 0), (0, 1)), constant_values=IGNORED)


def num_counted(labels_NT: Labels) -> int:
    """Number of labels that count."""
    return int((labels_NT != IGNORED).sum())


def held_out(num_rows: int) -> NDArray[np.bool_]:
    """Which rows are held out: whole runs of neighbours, because these are often of one text."""
    run_rows = max(1, num_rows // _MAX_RUNS)
    held_out_N: NDArray[np.bool_] = np.arange(num_rows) // run_rows % _HELD_OUT_RUN == (
        _HELD_OUT_RUN - 1
    )
    return held_out_N
