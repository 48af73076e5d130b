"""Routing by tiny language models, one per path (SmallTalk LM, arXiv 2410.03529).

A sequence takes the path whose language model finds its prefix most likely. They are trained
before the paths, by expectation maximization: each learns its share of the prefixes, then all
prefixes are shared out anew by likelihood, in equal shares so that no path is left without. No
path ever has to score anything.
"""

# ruff: noqa: N803, N806 - arrays carry their shape in their name: N sequences, T tokens, P paths

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from dipaco.config import ModelConfig, RunConfig
from dipaco.errors import BadBytes
from dipaco.model import PathNet, initialize
from dipaco.routing import FeatureExtractor
from dipaco.shards import Rows
from dipaco.tensors import Layout, decode_tensors, encode_tensors

_HEAD_WIDTH = 16
_BATCH_SEQUENCES = 32
_LEARNING_RATE = 3e-3
_WARMUP_STEPS = 10
_BETAS = (0.9, 0.95)
_MAX_LOGITS = 2**21  # scored at a time: 8 MiB, which stay in a cache


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TinyLMRouter:
    """One language model per path, on the CPU."""

    nets: tuple[PathNet, ...]

    def scores(self, prefixes_NT: Rows, features: FeatureExtractor) -> Tensor:
        """Log-likelihoods (nats) of the prefixes; `features` are not needed."""
        del features
        tokens_NT = torch.from_numpy(np.asarray(prefixes_NT).astype(np.int64))
        return torch.stack([log_likelihoods(net, tokens_NT) for net in self.nets], dim=1)

    def to_bytes(self) -> bytes:
        """The parameters of all models as safetensors, each stacked over the paths."""
        states = [net.state_dict() for net in self.nets]
        return encode_tensors(
            {f"lm.{name}": torch.stack([state[name] for state in states]) for name in states[0]}
        )

    @classmethod
    def from_bytes(cls, raw: bytes | memoryview, config: RunConfig) -> "TinyLMRouter":
        """The inverse of `to_bytes`; BadBytes if it is not such a router of this run."""
        nets = tuple(PathNet(lm_config(config)) for _ in range(config.topology.num_paths))
        shapes = {name: tuple(value.shape) for name, value in nets[0].state_dict().items()}
        layout: Layout = {
            f"lm.{name}": (torch.float32, (len(nets), *shape)) for name, shape in shapes.items()
        }
        try:
            stacked = decode_tensors(raw, layout)
        except ValueError as error:
            raise BadBytes(f"not the router of this run: {error}") from error
        if not all(bool(tensor.isfinite().all()) for tensor in stacked.values()):
            raise BadBytes("not the router of this run: a value is not finite")
        for number, net in enumerate(nets):
            net.load_state_dict({name: stacked[f"lm.{name}"][number] for name in shapes})
        return cls(nets=nets)


def train_tiny_lm_router(
    rows: Rows,
    config: RunConfig,
    *,
    device: torch.device | str = "cpu",
    on_progress: Callable[[int, int], None],
) -> TinyLMRouter:
    """Fit a router to the prefixes of some training rows; `on_progress(done, total)`.

    The first shares are random: equal models grow apart by what they happen to see. Later ones are
    of rows that no model has seen for as long as there are such, because each likes best what it
    was trained on.
    """
    routing, num_paths = config.routing, config.topology.num_paths
    generator = np.random.default_rng(config.seed)
    learners = [_Learner(PathNet(lm_config(config), device)) for _ in range(num_paths)]
    for learner in learners:
        initialize(learner.net, config.seed)
    order = generator.permutation(len(rows))
    num_rows = min(math.ceil(len(rows) / 2), num_paths * routing.lm_steps * _BATCH_SEQUENCES)
    done, total = 0, routing.lm_phases * num_paths
    for phase in range(routing.lm_phases):
        picked = np.take(order, range(phase * num_rows, (phase + 1) * num_rows), mode="wrap")
        prefixes = np.asarray(rows[np.sort(picked), : routing.prefix_tokens]).astype(np.int64)
        tokens_NT = torch.from_numpy(prefixes).to(device)
        if phase:
            scores = [log_likelihoods(learner.net, tokens_NT) for learner in learners]
            scores_NP = torch.stack(scores, dim=1)
        else:
            scores_NP = torch.from_numpy(generator.random((num_rows, num_paths)))
        assigned_N = balanced_assignment(scores_NP)
        for number, learner in enumerate(learners):
            share = np.flatnonzero(assigned_N == number)
            if len(share):
                learner.train(
                    tokens_NT, generator.choice(share, (routing.lm_steps, _BATCH_SEQUENCES))
                )
            done += 1
            on_progress(done, total)
    return TinyLMRouter(nets=tuple(learner.net.cpu() for learner in learners))


def balanced_assignment(scores_NP: Tensor) -> NDArray[np.int64]:
    """A path number for each sequence, no path more than ceil(N / P) times.

    Sequences choose one after another, those with the highest best score first, among the paths
    that still have room. Scores must be finite.
    """
    num_rows, num_paths = scores_NP.shape
    open_scores_NP = scores_NP.double().numpy().copy()
    room_P = np.full(num_paths, math.ceil(num_rows / num_paths))
    assigned_N = np.empty(num_rows, dtype=np.int64)
    for row in np.argsort(-open_scores_NP.max(axis=1, initial=-np.inf), kind="stable"):
        path = open_scores_NP[row].argmax()
        assigned_N[row] = path
        room_P[path] -= 1
        if not room_P[path]:
            open_scores_NP[:, path] = -np.inf
    return assigned_N


@torch.no_grad()
def log_likelihoods(net: PathNet, tokens_NT: Tensor) -> Tensor:
    """The log-likelihood (nats) [N] of each sequence, float32 on the CPU."""
    batch_sequences = max(1, _MAX_LOGITS // (tokens_NT.shape[1] * net.config.vocab_size))
    parts = [torch.empty(0)]
    parts += [-_nll(net, part).sum(dim=1).cpu() for part in torch.split(tokens_NT, batch_sequences)]
    return torch.cat(parts)


def lm_config(config: RunConfig) -> ModelConfig:
    """The shape of one tiny language model."""
    width = config.routing.lm_width
    num_heads = max(1, width // _HEAD_WIDTH)
    return ModelConfig(
        vocab_size=config.model.vocab_size,
        width=width,
        num_blocks=config.routing.lm_blocks,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_width=_HEAD_WIDTH,
        ffn_width=8 * round(width / 3),
        sequence_tokens=max(16, config.routing.prefix_tokens),
        end_token=config.model.end_token,
        pad_token=config.model.pad_token,
    )


class _Learner:
    """One model and its optimizer, which goes on from phase to phase."""

    def __init__(self, net: PathNet) -> None:
        self.net = net
        self._num_steps = 0
        self._optimizer = torch.optim.AdamW(
            net.parameters(), lr=_LEARNING_RATE, betas=_BETAS, fused=True
        )

    def train(self, tokens_NT: Tensor, batches: NDArray[np.int64]) -> None:
        """One step on each row [B] of `batches`, which are sequence numbers."""
        for batch in torch.from_numpy(batches).to(tokens_NT.device):
            self._num_steps += 1
            for group in self._optimizer.param_groups:
                group["lr"] = _LEARNING_RATE * min(1.0, self._num_steps / _WARMUP_STEPS)
            _nll(self.net, tokens_NT[batch]).mean().backward()  # type: ignore[no-untyped-call]
            self._optimizer.step()
            self._optimizer.zero_grad()


def _nll(net: PathNet, tokens_BT: Tensor) -> Tensor:
    """Negative log-likelihood (nats) [B, T], as if a document had just ended before each row."""
    read_BT = F.pad(tokens_BT[:, :-1], (1, 0), value=net.config.end_token)
    logits_BTV = net(read_BT)
    nll = F.cross_entropy(logits_BTV.flatten(0, 1), tokens_BT.flatten(), reduction="none")
    return nll.view(tokens_BT.shape)
