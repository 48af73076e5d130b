"""Which trainings are compared, and at which size.

All of one size share text, tokenizer, sequences and dense start, and are scored on the same test
sequences; but other seeds, the comparison of routers and that of small shards have their own, and a
dense training of their own. Every one is compared at equal steps; `dense-4x` has the tokens and
FLOPs of four paths.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from dipaco.config import RunConfig
from dipaco.reference import Options

Size = Literal["tiny", "cpu", "long", "gpu"]
Kind = Literal["paths", "dense", "synchronous"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Experiment:
    """One training. `reroute` lists the intervals, in tokens, of re-routing at test time."""

    name: str
    config: RunConfig
    kind: Kind = "paths"
    options: Options = field(default_factory=Options)
    steps_factor: int = 1
    reroute: tuple[int, ...] = (32,)
    token_router_steps: int = 0

    @property
    def num_steps(self) -> int:
        """Inner steps of each path."""
        return self.config.rounds.total_steps * self.steps_factor

    @property
    def tokens(self) -> int:
        """Tokens that all paths together are trained on, after the dense start."""
        config = self.config
        per_path = self.num_steps * config.inner.batch_sequences * config.model.sequence_tokens
        num_paths = 1 if self.kind == "dense" else config.topology.num_paths
        return per_path * num_paths * self.options.replicas


_CPU = """
name = "quality"
seed = 1
[model]
vocab_size = 2048
width = 128
num_blocks = 4
num_heads = 4
num_kv_heads = 2
ffn_width = 352
sequence_tokens = 128
[topology]
levels = [2, 2]
[corpus]
source = "python"
max_documents = 6000
max_document_bytes = 8192
valid_fraction = 0.03
test_fraction = 0.04
[dense_start]
steps = 300
learning_rate = 1e-3
warmup_steps = 20
batch_sequences = 16
[routing]
method = "kmeans"
router_fraction = 0.03
[inner]
batch_sequences = 16
learning_rate = 3e-3
warmup_steps = 5
[outer]
learning_rate = 0.7
momentum = 0.7
rescale = "none"
wire_format = "int8"
[rounds]
num_rounds = 20
inner_steps = 20
round_seconds = 60.0
eval_sequences = 32
"""
_TINY = {
    "corpus": {"max_documents": 1500},
    "dense_start": {"steps": 150, "batch_sequences": 8},
    "inner": {"batch_sequences": 8},
    "rounds": {"num_rounds": 7, "inner_steps": 20},
}
_LONG = {"rounds": {"num_rounds": 60}}
_GPU = Path(__file__).parents[2] / "examples" / "gpu.toml"
"""As long as the embedded corpus lasts: it ends at 15.6 M tokens of this vocabulary, which are one
epoch of four paths after 240 steps. More text (`--text`) is worth more steps.
"""
_VARIANT = {"inner": {"batch_sequences": 8}, "rounds": {"num_rounds": 10}}
"""A quarter of the tokens, because there are many variants."""


def base_config(size: Size, text: Path | None) -> RunConfig:
    """The 2x2 run that everything else is a variant of; on the files of a folder, if given."""
    changes: dict[str, dict[str, Any]] = {"tiny": _TINY, "long": _LONG}.get(size, {})
    config = RunConfig.from_toml(_GPU.read_text() if size == "gpu" else _CPU)
    config = varied(config, **changes)
    if text is not None:
        files = sorted(str(file) for file in text.rglob("*") if file.is_file())
        config = varied(config, corpus={"source": "text", "files": files})
    return config


def varied(config: RunConfig, **sections: dict[str, Any]) -> RunConfig:
    """The configuration with some values changed, by section."""
    values = config.to_dict()
    for section, changes in sections.items():
        values[section] = values[section] | changes
    return RunConfig.from_dict(values)


def experiments(size: Size, text: Path | None) -> list[Experiment]:
    """All trainings of a size, the most telling first."""
    base = base_config(size, text)
    if size == "tiny":
        four = varied(base, topology={"levels": [4, 4]})
        return [_dense("dense", base), _paths("2x2", base), _paths("4x4", four)]
    if size == "long":
        return [_dense("dense", base), _paths("2x2", base), *_controls(base)]
    if size == "gpu":
        flat, four = _flat(base), varied(base, topology={"levels": [4, 4]})
        return [
            *(_dense("dense", base), _paths("2x2", base), _paths("4x4", four)),
            *(_paths("flat-4", flat), *_controls(base)),
        ]
    short = varied(base, **_VARIANT)
    return [
        *_main(base),
        *_variants(short),
        *_small_shards(short),
        *_seeds(base),
    ]


def _paths(name: str, config: RunConfig, **more: Any) -> Experiment:
    return Experiment(name=name, config=config, **more)


def _dense(name: str, config: RunConfig, **more: Any) -> Experiment:
    single = varied(config, topology={"levels": [1]}, routing={"method": "hash"})
    return Experiment(name=name, config=single, kind="dense", **more)


def _flat(config: RunConfig) -> RunConfig:
    """Four paths that share nothing."""
    return varied(
        config,
        topology={"levels": [4], "path_specific_embedding": True},
        routing={"method": "kmeans"},
    )


def _specific(config: RunConfig) -> RunConfig:
    """The paper's choice: the first and last block of both levels, and the embedding.

    Of four blocks only the outer two, which leaves each level one to share.
    """
    num_blocks = config.model.num_blocks
    first_and_last = {0, num_blocks // 2 - 1, num_blocks // 2, num_blocks - 1}
    blocks = sorted(first_and_last) if num_blocks > len(first_and_last) else [0, num_blocks - 1]
    return varied(
        config, topology={"path_specific_blocks": blocks, "path_specific_embedding": True}
    )


def _main(base: RunConfig) -> Iterator[Experiment]:
    yield _dense("dense", base)
    yield _paths("2x2", base, options=Options(early_stopping=True), reroute=(16, 32, 64))
    yield _paths("flat-4", _flat(base), options=Options(early_stopping=True))
    yield _paths("1x1", _single(base), reroute=())
    stopped: dict[str, Any] = {"options": Options(early_stopping=True), "reroute": (16, 32, 64)}
    yield _paths("4x4", varied(base, topology={"levels": [4, 4]}), **stopped)
    yield Experiment(name="2x2-synchronous", config=base, kind="synchronous")
    yield from _controls(base)


def _controls(base: RunConfig) -> Iterator[Experiment]:
    """How much of it is due to several paths, and to the router."""
    yield _paths("diloco-4-main", _single(base), options=Options(replicas=4), reroute=())
    yield _paths("2x2-hash-main", varied(base, routing={"method": "hash"}))


def _single(config: RunConfig) -> RunConfig:
    """One path alone: what the outer step does without anything to average."""
    return varied(config, topology={"levels": [1]}, routing={"method": "hash"})


def _variants(short: RunConfig) -> Iterator[Experiment]:
    yield _dense("dense-short", short)
    yield _paths("2x2-short", short)
    # What has the tokens and FLOPs of four paths.
    yield _dense("dense-4x", short, steps_factor=4)
    yield _paths("diloco-4", _single(short), options=Options(replicas=4), reroute=())
    yield _paths("1x1-short", _single(short), reroute=())
    yield _paths("2x4-short", varied(short, topology={"levels": [2, 4]}))
    yield from _routers(short)
    for rescale in ("rda", "sqrt"):
        yield _paths(f"2x2-{rescale}", varied(short, outer={"rescale": rescale}))
    for wire_format in ("int4", "float32"):
        yield _paths(f"2x2-{wire_format}", varied(short, outer={"wire_format": wire_format}))
    yield _paths("2x2-topk-momentum", varied(short, outer={"wire_format": "topk"}))
    # What SparseLoCo does: what is not sent yet takes the place of momentum.
    topk = {"wire_format": "topk", "momentum": 0.0, "learning_rate": 1.0}
    yield _paths("2x2-topk", varied(short, outer=topk))
    yield Experiment(name="2x2-synchronous-short", config=short, kind="synchronous")
    yield _paths("2x2-specific", _specific(short))
    num_steps = short.rounds.total_steps
    for inner_steps in (10, 200, 50, 100):
        schedule = {"num_rounds": num_steps // inner_steps, "inner_steps": inner_steps}
        yield _paths(f"2x2-inner-{inner_steps}", varied(short, rounds=schedule))
    four = varied(short, topology={"levels": [4, 4]})
    yield _paths("4x4-short", four)
    yield _paths("4x4-specific", _specific(four), options=Options(early_stopping=True))
    yield _paths("2x2-float16", varied(short, outer={"wire_format": "float16"}))


def _routers(short: RunConfig) -> Iterator[Experiment]:
    # All of them on the same text and dense start, which depend on how much router data there is: a
    # classifier of 128 columns needs more than the other trainings keep for it.
    fair = varied(short, routing={"router_fraction": 0.15})
    phases = {"method": "discriminative", "phases": [short.rounds.num_rounds // 3]}
    yield _paths(
        "2x2-discriminative",
        varied(fair, routing=phases),
        reroute=(16, 32, 64),
        token_router_steps=300,
    )
    for method in ("kmeans", "product_kmeans", "hash", "tiny_lm"):
        routed = varied(fair, routing={"method": method})
        yield _paths(f"2x2-{method.replace('_', '-')}", routed)
    yield _dense("dense-routers", fair)
    yield _paths("2x2-overlap", varied(short, routing={"overlap": 2}))


def _small_shards(short: RunConfig) -> Iterator[Experiment]:
    """So little text that every path sees its shard several times."""
    corpus = {"max_documents": 150, "valid_fraction": 0.2, "test_fraction": 0.2}
    rounds = {"num_rounds": 2 * short.rounds.num_rounds}
    small = varied(short, corpus=corpus, rounds=rounds)
    yield _dense("dense-small", small)
    yield _paths("flat-4-small", _flat(small), options=Options(early_stopping=True))
    yield _paths("2x2-small", small, options=Options(early_stopping=True))


def _seeds(base: RunConfig) -> Iterator[Experiment]:
    for seed in (2, 3):
        seeded = replace(base, seed=seed)
        yield _dense(f"dense-seed-{seed}", seeded)
        yield _paths(f"2x2-seed-{seed}", seeded)
