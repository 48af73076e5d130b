"""What the whole run agrees on: everything that affects numbers, and nothing else.

Device, threads, disk and addresses are a volunteer's own choice and are never here. Read from
TOML, validated on construction, identified by `RunConfig.fingerprint()`.
"""

import hashlib
import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from dipaco.config_text import parse_toml, plain_table, read_table, toml_of
from dipaco.errors import ConfigError

MAX_PATHS = 2**16  # a path is chosen and announced one by one; more would be a typing error
MAX_VOCABULARY = 2**16  # tokens are stored as 16-bit integers
MAX_INTEGER = 2**31 - 1


def _check(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ConfigError(
            f"{name} is {value}", hint=f"accepted: a value from {low} to {high}, both included"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The network of one path: a Llama of this shape.

    `head_width` 0 stands for `width` / `num_heads`. `end_token` ends a document and `pad_token`
    fills a row; both are special tokens of the tokenizer, which no text is encoded to.
    """

    vocab_size: int
    width: int
    num_blocks: int
    num_heads: int
    num_kv_heads: int
    ffn_width: int
    sequence_tokens: int
    head_width: int = 0
    tied_embedding: bool = True
    rope_theta: float = 10_000.0
    norm_epsilon: float = 1e-5
    end_token: int = 0
    pad_token: int = 1

    def __post_init__(self) -> None:
        # 256 bytes, two special tokens, and at least a few merges.
        _check("model.vocab_size", self.vocab_size, 260, MAX_VOCABULARY)
        _check("model.width", self.width, 8, 32_768)
        _check("model.num_blocks", self.num_blocks, 1, 512)
        _check("model.num_heads", self.num_heads, 1, 512)
        _check("model.num_kv_heads", self.num_kv_heads, 1, self.num_heads)
        _check("model.ffn_width", self.ffn_width, 8, 262_144)
        _check("model.sequence_tokens", self.sequence_tokens, 16, 65_536)
        _check("model.rope_theta", self.rope_theta, 100.0, 1e9)
        _check("model.norm_epsilon", self.norm_epsilon, 1e-8, 1e-2)
        for name in ("end_token", "pad_token"):
            _check(f"model.{name}", getattr(self, name), 0, self.vocab_size - 1)
        if self.end_token == self.pad_token:
            raise ConfigError(
                f"model.end_token and model.pad_token are both {self.end_token}",
                hint="accepted: two different tokens, because the end of a document is learned",
            )
        if self.head_width:
            _check("model.head_width", self.head_width, 2, 4096)
            if self.head_width % 2:
                raise ConfigError(
                    f"model.head_width is {self.head_width}",
                    hint="accepted: an even number, because rotary positions turn pairs",
                )
        elif self.width % (2 * self.num_heads):
            raise ConfigError(
                f"model.width is {self.width}",
                hint=f"accepted: a multiple of twice model.num_heads ({2 * self.num_heads}), "
                "because rotary positions turn pairs; or set model.head_width",
            )
        else:
            object.__setattr__(self, "head_width", self.width // self.num_heads)
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"model.num_kv_heads is {self.num_kv_heads}",
                hint=f"accepted: a divisor of model.num_heads ({self.num_heads})",
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class TopologyConfig:
    """How the network is cut: experts per level, and what each path keeps for itself."""

    levels: tuple[int, ...]
    path_specific_blocks: tuple[int, ...] = ()
    path_specific_embedding: bool = False

    def __post_init__(self) -> None:
        _check("number of topology.levels", len(self.levels), 1, 16)
        for num_experts in self.levels:
            _check("topology.levels", num_experts, 1, MAX_PATHS)
        _check("number of paths (product of topology.levels)", self.num_paths, 1, MAX_PATHS)
        if len(set(self.path_specific_blocks)) != len(self.path_specific_blocks):
            raise ConfigError(
                f"topology.path_specific_blocks is {list(self.path_specific_blocks)}",
                hint="accepted: each block at most once",
            )

    @property
    def num_paths(self) -> int:
        """Number of paths: the product of the levels."""
        return math.prod(self.levels)


@dataclass(frozen=True, kw_only=True, slots=True)
class CorpusConfig:
    """Where documents come from; `python` is the text that every Python installation has.

    Of the sources, `valid_fraction` are scored during training and `test_fraction` only after it.
    """

    source: Literal["python", "text", "json", "parquet", "hub"]
    files: tuple[str, ...] = ()
    name: str = ""
    config: str = ""
    split: str = "train"
    text_column: str = "text"
    max_documents: int = 10_000
    max_document_bytes: int = 65_536
    valid_fraction: float = 0.05
    test_fraction: float = 0.02

    def __post_init__(self) -> None:
        _check("corpus.max_documents", self.max_documents, 1, MAX_INTEGER)
        _check("corpus.max_document_bytes", self.max_document_bytes, 64, 2**24)
        _check("corpus.valid_fraction", self.valid_fraction, 0.0001, 0.4)
        _check("corpus.test_fraction", self.test_fraction, 0.0001, 0.4)
        if self.source in ("text", "json", "parquet") and not self.files:
            raise ConfigError(
                "corpus.files is empty", hint=f"name the {self.source} files to read, in a list"
            )
        if self.source == "hub" and not self.name:
            raise ConfigError(
                "corpus.name is empty", hint='name a data set of the hub, such as "allenai/c4"'
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class DenseStartConfig:
    """The short dense training from which every module starts (paper Algorithm 1, theta bar).

    It begins with random parameters, or with those of a Llama in the directory `checkpoint`.
    """

    steps: int
    learning_rate: float
    warmup_steps: int
    batch_sequences: int
    checkpoint: str = ""

    def __post_init__(self) -> None:
        _check("dense_start.steps", self.steps, 0, MAX_INTEGER)
        _check("dense_start.learning_rate", self.learning_rate, 0.0, 1.0)
        _check("dense_start.warmup_steps", self.warmup_steps, 0, MAX_INTEGER)
        _check("dense_start.batch_sequences", self.batch_sequences, 1, 65_536)


Rescale = Literal["sqrt", "rda", "none"]
RoutingMethod = Literal["kmeans", "product_kmeans", "discriminative", "tiny_lm", "hash"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutingConfig:
    """How sequences find their path, from their first `prefix_tokens` tokens (paper 2.4).

    `overlap` is the number of paths that train on a sequence. `router_fraction` of all
    sources is router data: no path trains on it. A discriminative run starts with product k-means
    and shards its data anew after each of the rounds in `phases`.
    """

    method: RoutingMethod = "kmeans"
    prefix_tokens: int = 32
    overlap: int = 1
    router_fraction: float = 0.0
    phases: tuple[int, ...] = ()
    lm_width: int = 32
    lm_blocks: int = 2
    lm_steps: int = 100
    lm_phases: int = 4

    def __post_init__(self) -> None:
        _check("routing.prefix_tokens", self.prefix_tokens, 1, 32_768)
        _check("routing.overlap", self.overlap, 1, 64)
        _check("routing.router_fraction", self.router_fraction, 0.0, 0.5)
        _check("routing.lm_width", self.lm_width, 8, 1024)
        _check("routing.lm_blocks", self.lm_blocks, 1, 32)
        _check("routing.lm_steps", self.lm_steps, 1, MAX_INTEGER)
        _check("routing.lm_phases", self.lm_phases, 1, 100)
        if list(self.phases) != sorted(set(self.phases)) or min(self.phases, default=1) < 1:
            raise ConfigError(
                f"routing.phases is {list(self.phases)}",
                hint="accepted: numbers of rounds, ascending, the first at least 1",
            )
        if self.method == "discriminative" and not (self.phases and self.router_fraction):
            raise ConfigError(
                "routing.method is discriminative without a phase or router data",
                hint="set routing.phases, such as [4], and routing.router_fraction, such as 0.05",
            )
        if self.phases and self.method != "discriminative":
            raise ConfigError(
                f"routing.phases is set, but routing.method is {self.method}",
                hint='set routing.method to "discriminative", or remove the phases',
            )

    def phase_in_force(self, num_rounds: int) -> int:
        """The last of the phases that are over after `num_rounds` rounds; 0 before the first."""
        return max((phase for phase in self.phases if phase <= num_rounds), default=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class InnerConfig:
    """The inner loop of a path: AdamW with warm-up and cosine (paper 2.6)."""

    batch_sequences: int
    learning_rate: float
    final_learning_rate_fraction: float = 0.1
    warmup_steps: int
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    gradient_clip_norm: float = 1.0
    train_on_prefix: bool = True

    def __post_init__(self) -> None:
        _check("inner.batch_sequences", self.batch_sequences, 1, 65_536)
        _check("inner.learning_rate", self.learning_rate, 0.0, 1.0)
        _check("inner.final_learning_rate_fraction", self.final_learning_rate_fraction, 0.0, 1.0)
        _check("inner.warmup_steps", self.warmup_steps, 0, MAX_INTEGER)
        _check("inner.weight_decay", self.weight_decay, 0.0, 10.0)
        _check("inner.beta1", self.beta1, 0.0, 0.9999)
        _check("inner.beta2", self.beta2, 0.0, 0.999999)
        _check("inner.gradient_clip_norm", self.gradient_clip_norm, 1e-6, 1e6)


@dataclass(frozen=True, kw_only=True, slots=True)
class OuterConfig:
    """The outer step of a module: Nesterov on rescaled averages (paper 2.6, 2.7 and 7.1).

    `learning_rate_by_paths` is a list of [number of paths, rate]: a module through which at least
    so many paths run takes that rate instead of `learning_rate`, whoever contributes. No
    contribution counts as longer than `clip_norm` times the median one; 0 lets all pass.
    """

    learning_rate: float = 0.7
    momentum: float = 0.9
    rescale: Rescale = "sqrt"
    wire_format: Literal["float32", "float16", "int8", "int4", "topk"] = "int4"
    clip_norm: float = 3.0
    learning_rate_by_paths: tuple[tuple[float, ...], ...] = ()

    def __post_init__(self) -> None:
        _check("outer.learning_rate", self.learning_rate, 0.0, 10.0)
        _check("outer.momentum", self.momentum, 0.0, 0.9999)
        _check("outer.clip_norm", self.clip_norm, 0.0, 1e6)
        for entry in self.learning_rate_by_paths:
            if len(entry) != 2:
                raise ConfigError(
                    f"outer.learning_rate_by_paths has {list(entry)}",
                    hint="accepted: pairs [number of paths, learning rate]",
                )
            _check("outer.learning_rate_by_paths (paths)", entry[0], 1, MAX_PATHS)
            _check("outer.learning_rate_by_paths (rate)", entry[1], 0.0, 10.0)

    def of_module(self, num_paths: int) -> "OuterConfig":
        """The settings of a module through which `num_paths` paths run: its own learning rate."""
        reached = [entry for entry in self.learning_rate_by_paths if entry[0] <= num_paths]
        rate = max(reached)[1] if reached else self.learning_rate
        return replace(self, learning_rate=rate, learning_rate_by_paths=())


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundsConfig:
    """The schedule. A round lasts `round_seconds` and holds at most `inner_steps` inner steps.

    On one machine `paths_per_round` paths train in a round, 0 for all; in a swarm, as many as there
    are peers. With `staggered`, the rounds of a swarm's levels end one after another, evenly over
    the slot, which divides the peak of the traffic by the number of levels.
    """

    num_rounds: int
    round_seconds: float
    inner_steps: int
    blocking: bool = False
    num_keepers: int = 2
    eval_sequences: int = 64
    paths_per_round: int = 0
    staggered: bool = False

    def __post_init__(self) -> None:
        _check("rounds.num_rounds", self.num_rounds, 1, MAX_INTEGER)
        _check("rounds.round_seconds", self.round_seconds, 0.1, 1e6)
        _check("rounds.inner_steps", self.inner_steps, 1, 1_000_000)
        _check("rounds.num_keepers", self.num_keepers, 0, 64)
        _check("rounds.eval_sequences", self.eval_sequences, 1, MAX_INTEGER)
        _check("rounds.paths_per_round", self.paths_per_round, 0, MAX_PATHS)
        if self.blocking and self.staggered:
            raise ConfigError(
                "rounds.blocking and rounds.staggered are both set",
                hint="accepted: one of them; an exact run trains all levels for equally long",
            )

    @property
    def total_steps(self) -> int:
        """Inner steps of one path over the whole run, at most."""
        return self.num_rounds * self.inner_steps


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """One run. Two peers work together only if their fingerprints are equal."""

    name: str
    seed: int = 0
    model: ModelConfig
    topology: TopologyConfig
    corpus: CorpusConfig
    dense_start: DenseStartConfig
    routing: RoutingConfig = field(default_factory=RoutingConfig)
    inner: InnerConfig
    outer: OuterConfig = field(default_factory=OuterConfig)
    rounds: RoundsConfig

    def __post_init__(self) -> None:
        _check("length of name", len(self.name), 1, 64)
        _check("seed", self.seed, 0, MAX_INTEGER)
        for block in self.topology.path_specific_blocks:
            _check("topology.path_specific_blocks", block, 0, self.model.num_blocks - 1)
        num_shared = self.model.num_blocks - len(self.topology.path_specific_blocks)
        if num_shared < len(self.topology.levels):
            raise ConfigError(
                f"topology.levels has {len(self.topology.levels)} levels for {num_shared} blocks",
                hint="accepted: at least one block of model.num_blocks per level, besides "
                "topology.path_specific_blocks",
            )
        corpus = self.corpus
        held_out = corpus.valid_fraction + corpus.test_fraction + self.routing.router_fraction
        if held_out >= 1:
            raise ConfigError(
                f"corpus.valid_fraction, test_fraction and routing.router_fraction are {held_out:g}"
                " in all",
                hint="accepted: less than 1, because paths train on what is left",
            )
        if 2 * self.routing.prefix_tokens > self.model.sequence_tokens:
            raise ConfigError(
                f"routing.prefix_tokens is {self.routing.prefix_tokens}",
                hint="accepted: at most half of model.sequence_tokens "
                f"({self.model.sequence_tokens})",
            )
        if max(self.routing.phases, default=0) >= self.rounds.num_rounds:
            raise ConfigError(
                f"routing.phases is {list(self.routing.phases)}",
                hint=f"accepted: less than rounds.num_rounds ({self.rounds.num_rounds}), since "
                "nothing would be trained after it",
            )

    @classmethod
    def from_file(cls, file: Path) -> "RunConfig":
        """Read a configuration's TOML file; ConfigError as `from_toml`, or if it is no text."""
        try:
            return cls.from_dict(parse_toml(file.read_text(), str(file)))
        except UnicodeDecodeError as error:
            raise ConfigError(f"{file} is not a text file", hint="save it as UTF-8") from error

    @classmethod
    def from_toml(cls, text: str) -> "RunConfig":
        """Read a configuration; ConfigError names the key that is wrong."""
        return cls.from_dict(parse_toml(text, "the configuration"))

    @classmethod
    def from_dict(cls, values: object) -> "RunConfig":
        """The inverse of `to_dict`; ConfigError on anything else, whatever it is."""
        return read_table(cls, values)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able values, one dictionary per section."""
        return plain_table(self)

    def to_toml(self) -> str:
        """Every value, defaults included, as TOML that `from_toml` reads."""
        return toml_of(self.to_dict())

    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, of the canonical JSON of `to_dict`."""
        canonical = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()
