"""Which trainings are compared, and at which size.

All of one size share text, tokenizer, sequences and dense start, and are scored on the same test
sequences. Every one is compared at equal steps; `dense-4x` has the tokens and FLOPs of four paths.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from dipaco.config import RunConfig
from dipaco.reference import Options

Size = Literal["tiny", "cpu", "gpu"]
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
max_documents = 1500
max_document_bytes = 8192
valid_fraction = 0.03
test_fraction = 0.04
[dense_start]
steps = 300
learning_rate = 4e-3
warmup_steps = 20
batch_sequences = 8
[routing]
method = "product_kmeans"
router_fraction = 0.03
[inner]
batch_sequences = 8
learning_rate = 2e-3
warmup_steps = 5
[outer]
learning_rate = 0.7
momentum = 0.7
rescale = "none"
[rounds]
num_rounds = 20
inner_steps = 20
round_seconds = 60.0
eval_sequences = 32
"""
_TINY = {"rounds": {"num_rounds": 8, "inner_steps": 20}, "dense_start": {"steps": 150}}
_GPU = {
    "model": {
        "vocab_size": 8192,
        "width": 512,
        "num_blocks": 8,
        "num_heads": 8,
        "num_kv_heads": 4,
        "ffn_width": 1408,
        "sequence_tokens": 512,
        "head_width": 0,
    },
    "corpus": {"max_documents": 100_000},
    "dense_start": {"steps": 2000, "learning_rate": 1e-3, "batch_sequences": 32},
    "inner": {"batch_sequences": 32, "learning_rate": 6e-4, "warmup_steps": 50},
    "rounds": {"num_rounds": 40, "inner_steps": 100},
}
_ABLATION_ROUNDS = 12  # of 20 steps: enough to tell variants apart, a third of the time


def base_config(size: Size, text: Path | None) -> RunConfig:
    """The 2x2 run that everything else is a variant of; on the files of a folder, if given."""
    config = RunConfig.from_toml(_CPU)
    changes: dict[str, dict[str, Any]] = {"tiny": _TINY, "cpu": {}, "gpu": _GPU}[size]
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
    chosen = [*_main(base)]
    if size != "tiny":
        chosen += [*_more_paths(base), *_ablations(base)]
        return chosen
    return [e for e in chosen if e.name in ("dense", "2x2")] + [
        _paths("4x4", varied(base, topology={"levels": [4, 4]}))
    ]


def _paths(name: str, config: RunConfig, **more: Any) -> Experiment:
    return Experiment(name=name, config=config, **more)


def _dense(name: str, config: RunConfig, **more: Any) -> Experiment:
    single = varied(config, topology={"levels": [1]}, routing={"method": "hash"})
    return Experiment(name=name, config=single, kind="dense", **more)


def _flat(config: RunConfig, num_paths: int) -> RunConfig:
    """One level, nothing shared."""
    return varied(
        config,
        topology={"levels": [num_paths], "path_specific_embedding": True},
        routing={"method": "kmeans"},
    )


def _main(base: RunConfig) -> Iterator[Experiment]:
    for seed in (1, 2):
        suffix = "" if seed == 1 else f"-seed-{seed}"
        seeded = replace(base, seed=seed)
        yield _dense(f"dense{suffix}", seeded)
        yield _paths(
            f"2x2{suffix}",
            seeded,
            options=Options(early_stopping=True),
            reroute=(16, 32, 64) if seed == 1 else (32,),
        )
        yield _paths(f"flat-4{suffix}", _flat(seeded, 4))


def _more_paths(base: RunConfig) -> Iterator[Experiment]:
    yield _dense("dense-4x", base, steps_factor=4)
    diloco = varied(base, topology={"levels": [1]}, routing={"method": "kmeans"})
    yield _paths("diloco-4", diloco, options=Options(replicas=4), reroute=())
    four = varied(base, topology={"levels": [4, 4]})
    yield _paths("2x4", varied(base, topology={"levels": [2, 4]}))
    yield _paths("4x4", four, options=Options(early_stopping=True), reroute=(16, 32, 64))
    # The paper's choice, scaled down: the first and the last block of each level would be all.
    specific = {"path_specific_blocks": [0, 3], "path_specific_embedding": True}
    yield _paths("4x4-specific", varied(four, topology=specific))


def _ablations(base: RunConfig) -> Iterator[Experiment]:
    rounds = {"num_rounds": _ABLATION_ROUNDS}
    short = varied(base, rounds=rounds)
    yield _dense("dense-short", short)
    yield _paths("2x2-short", short)
    for wire_format in ("float32", "float16", "int4"):
        yield _paths(f"2x2-{wire_format}", varied(short, outer={"wire_format": wire_format}))
    for rescale in ("sqrt", "rda"):
        yield _paths(f"2x2-{rescale}", varied(short, outer={"rescale": rescale}))
    num_steps = short.rounds.total_steps
    for inner_steps in (10, 40, 80, 120):
        schedule = {"num_rounds": num_steps // inner_steps, "inner_steps": inner_steps}
        yield _paths(f"2x2-inner-{inner_steps}", varied(short, rounds=schedule))
    yield Experiment(name="2x2-synchronous", config=short, kind="synchronous")
    eight = varied(short, topology={"levels": [2, 4]})
    phase = {"method": "discriminative", "phases": [_ABLATION_ROUNDS // 3]}
    yield _paths("2x4-short", eight)
    yield _paths("2x4-kmeans", varied(eight, routing={"method": "kmeans"}))
    yield _paths(
        "2x4-discriminative",
        varied(eight, routing=phase),
        reroute=(16, 32, 64),
        token_router_steps=300,
    )
    yield _paths("2x4-tiny-lm", varied(eight, routing={"method": "tiny_lm"}))
    yield _paths("2x4-hash", varied(eight, routing={"method": "hash"}))
    yield _paths("2x4-overlap", varied(eight, routing={"overlap": 2}))
    small = varied(
        short, corpus={"max_documents": 150, "valid_fraction": 0.2, "test_fraction": 0.2}
    )
    small = varied(small, rounds={"num_rounds": 2 * _ABLATION_ROUNDS})
    yield _dense("dense-small", small)
    yield _paths("2x2-small", small, options=Options(early_stopping=True))
    yield _paths("flat-4-small", _flat(small, 4), options=Options(early_stopping=True))
