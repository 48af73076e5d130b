"""From a corpus to everything a run begins with, in stages, each of which can be resumed.

    tokenizer -> sequences -> dense start -> states -> router -> shards

A stage is named by what it depends on: the parts of the configuration it reads and the stage
before. If a directory holds its result under that name, it is not done again, so an interrupted
preparation continues and a changed outer learning rate costs nothing.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dipaco.checkpoint import ModuleState, sweep, tensors_of, write_atomically, write_tensors
from dipaco.config import RunConfig
from dipaco.corpus import load_documents, split_of
from dipaco.dense import single_path
from dipaco.digest import index_of_file
from dipaco.document import Split
from dipaco.errors import ConfigError
from dipaco.inner import PathTrainer
from dipaco.llama import read_llama
from dipaco.model import PathNet, initialize, read_module, write_module
from dipaco.routing import MAX_FIT_SEQUENCES, HashRouter, Router, fit_centers
from dipaco.sequences import SEQUENCES_DIR, write_sequences
from dipaco.sharding import shard_corpus
from dipaco.shards import Rows, Shard, evenly_spread
from dipaco.start import RUN_FILE, START_FILE, TOKENIZER_FILE, Start
from dipaco.tensors import decode_tensors, layout_of
from dipaco.tiny_lm import train_tiny_lm_router
from dipaco.tokenizer import train_tokenizer
from dipaco.topology import ModuleID, Topology

Progress = Callable[[str, int, int], None]
"""Called with the name of a stage, the units done and the units in total."""

DENSE_FILE = "dense.safetensors"
SOURCES_FILE = "sources.json"
_STAGE = ".stage.json"
# Enough for every core, and while it is encoded, some 20 bytes of memory for each.
_BATCH_CHARACTERS = 2**21
_TOKENIZER_CHARACTERS = 100_000_000  # more text hardly changes a vocabulary


def prepare_start(
    config: RunConfig,
    directory: Path,
    progress: Progress = lambda stage, done, total: None,
    *,
    device: torch.device | str = "cpu",
) -> Start:
    """Make `directory` hold the start of a run, doing only what is not done yet.

    Interrupted, it leaves a finished start of the configuration before, or none. No other process
    may be at work there (`dipaco.locking`).
    """
    (directory / "shards").mkdir(parents=True, exist_ok=True)
    (directory / "states").mkdir(exist_ok=True)
    sweep(directory, directory / "states", directory / SEQUENCES_DIR)
    _Preparation(config, directory, progress, torch.device(device)).run()
    write_atomically(directory / RUN_FILE, config.to_toml().encode())
    write_atomically(directory / START_FILE, _json({"fingerprint": config.fingerprint()}))
    return Start.load(directory)


def check_sources(config: RunConfig, directory: Path) -> None:
    """ConfigError if a local file was changed since `directory` was first prepared from it.

    Once a stage is done it is not prepared anew: that would take tokenizer and shards from
    trainings that have begun. A file that is gone was not changed: what was prepared is then the
    only copy.
    """
    record_file = directory / SOURCES_FILE
    known = {}
    if record_file.exists() and any(directory.glob(f"*{_STAGE}")):
        known = json.loads(record_file.read_text())
    for file in _source_files(config):
        as_is = [file.stat().st_size, file.stat().st_mtime_ns]
        *as_it_was, digest_before = known.get(str(file), [None])
        if as_is == as_it_was:
            continue
        digest = index_of_file(file).digest
        if digest_before not in (None, digest):
            raise ConfigError(
                f"{file} was changed after {directory} was prepared from it",
                hint=f"take another directory, or delete {record_file} to go on with what was "
                "prepared",
            )
        known[str(file)] = [*as_is, digest]
    directory.mkdir(parents=True, exist_ok=True)
    write_atomically(record_file, _json(known))


def _source_files(config: RunConfig) -> list[Path]:
    """The files of the corpus, and of the checkpoint, that are on this machine."""
    is_local = config.corpus.source in ("text", "json", "parquet")
    files = [Path(name) for name in config.corpus.files if is_local]
    if config.dense_start.checkpoint:
        files += sorted(Path(config.dense_start.checkpoint).glob("*.json"))
        files += sorted(Path(config.dense_start.checkpoint).glob("*.safetensors"))
    return [file for file in files if file.is_file()]


class _Preparation:
    """The stages, and what they leave in the directory."""

    def __init__(
        self, config: RunConfig, directory: Path, progress: Progress, device: torch.device
    ) -> None:
        self._config = config
        self._topology = Topology.of(config)
        self._start = Start(config, directory)
        self._directory = directory
        self._progress = progress
        self._device = device
        self._train_features: Tensor | None = None
        """Of all training rows, once a router was fitted to all; so at most `MAX_FIT_SEQUENCES`."""

    @property
    def _dense_steps(self) -> int:
        return self._config.dense_start.steps

    @property
    def _dense_config(self) -> RunConfig:
        """The run that the dense start is: one path, with its own learning rate and batch."""
        dense = self._config.dense_start
        inner = replace(
            self._config.inner,
            learning_rate=dense.learning_rate,
            warmup_steps=dense.warmup_steps,
            batch_sequences=dense.batch_sequences,
        )
        return replace(single_path(self._config, dense.steps), inner=inner)

    def run(self) -> None:
        """All stages."""
        config, model, routing = self._config, self._config.model, self._config.routing
        key = self._stage("tokenizer", "", self._tokenizer_inputs, self._tokenizer)
        key = self._stage(
            "sequences",
            key,
            [
                model.sequence_tokens,
                routing.prefix_tokens,
                routing.router_fraction,
                model.end_token,
                model.pad_token,
            ],
            self._sequences,
        )
        dense = [config.seed, model, config.dense_start, self._dense_config.inner]
        key = self._stage("dense start", key, dense, self._dense_start)
        key = self._stage("states", key, [config.topology], self._states)
        routed = replace(routing, overlap=1, phases=(1,) if routing.phases else ())
        key = self._stage("router", key, [config.seed, routed], self._router)
        self._stage("shards", key, [routing.overlap], self._shards)

    @property
    def _tokenizer_inputs(self) -> list[Any]:
        return [
            self._config.corpus,
            self._config.model.vocab_size,
            self._config.routing.router_fraction,
            self._config.dense_start.checkpoint,
        ]

    def _stage(
        self, name: str, before: str, inputs: list[Any], work: Callable[[], Iterable[Path]]
    ) -> str:
        """Do `work`, which returns the files it wrote, unless it is done; return its key."""
        plain = [asdict(value) if hasattr(value, "__slots__") else value for value in inputs]
        key = hashlib.sha256(_json([name, before, plain])).hexdigest()
        record_file = self._directory / f"{name.replace(' ', '-')}{_STAGE}"
        if self._is_done(record_file, key):
            self._progress(name, 1, 1)
            return key
        self._progress(name, 0, 1)
        # Until all stages are done again, this is no start: its parts are of two configurations.
        (self._directory / START_FILE).unlink(missing_ok=True)
        record_file.unlink(missing_ok=True)
        files = {str(f.relative_to(self._directory)): f.stat().st_size for f in work()}
        write_atomically(record_file, _json({"key": key, "files": files}))
        self._progress(name, 1, 1)
        return key

    def _is_done(self, record_file: Path, key: str) -> bool:
        try:
            record = json.loads(record_file.read_text())
            return bool(record["key"] == key) and all(
                (self._directory / name).stat().st_size == size
                for name, size in record["files"].items()
            )
        except (OSError, ValueError, LookupError):
            return False

    def _documents(self, stage: str) -> Iterator[tuple[Split, str]]:
        """The split and text of every document; the corpus is read anew for each stage."""
        corpus, fraction = self._config.corpus, self._config.routing.router_fraction
        for number, document in enumerate(load_documents(corpus), start=1):
            yield split_of(document.source, corpus, fraction), document.text
            self._progress(stage, number, corpus.max_documents)

    def _tokenizer(self) -> list[Path]:
        checkpoint = self._config.dense_start.checkpoint
        if checkpoint:
            raw = _checkpoint_tokenizer(Path(checkpoint))
        else:
            raw = train_tokenizer(self._training_texts(), self._config.model.vocab_size).to_bytes()
        write_atomically(self._start.tokenizer_file, raw)
        self._start.tokenizer()  # of a checkpoint: is it one for this model?
        return [self._start.tokenizer_file]

    def _training_texts(self) -> Iterator[str]:
        """A sample of the training documents: documents come in an order that makes it fair."""
        num_characters = 0
        for split, text in self._documents("tokenizer"):
            if split == "train":
                yield text
                num_characters += len(text)
                if num_characters > _TOKENIZER_CHARACTERS:
                    return

    def _sequences(self) -> list[Path]:
        model = self._config.model
        return write_sequences(
            self._directory,
            self._encoded_documents(),
            sequence_tokens=model.sequence_tokens,
            prefix_tokens=self._config.routing.prefix_tokens,
            end_token=model.end_token,
            pad_token=model.pad_token,
        )

    def _encoded_documents(self) -> Iterator[tuple[Split, list[int]]]:
        tokenizer = self._start.tokenizer()
        for batch in _batches(self._documents("sequences")):
            encoded = tokenizer.encode_all([text for _, text in batch])
            yield from zip((split for split, _ in batch), encoded, strict=True)

    def _dense_start(self) -> list[Path]:
        net = self._train_dense_start()
        file = self._directory / DENSE_FILE
        tensors = {name: value.detach().cpu() for name, value in net.named_parameters()}
        write_tensors(file, tensors)
        return [file]

    def _train_dense_start(self) -> PathNet:
        config = self._dense_config
        topology = Topology.of(config)
        path = topology.paths[0]
        net = PathNet(config.model)
        if config.dense_start.checkpoint:
            net = read_llama(Path(config.dense_start.checkpoint), config.model)
        else:
            initialize(net, config.seed)
        shard = Shard(path=path, train=self._start.rows("train"), valid=self._start.rows("valid"))
        trainer = PathTrainer(config, topology, path, shard, device=self._device)
        for module in trainer.modules:
            trainer.write_module(module, read_module(net, topology, module))
        for step in range(self._dense_steps):
            trainer.train_step(step)
            self._progress("dense start", step + 1, self._dense_steps)
        for module in trainer.modules:
            write_module(net, topology, module, trainer.read_module(module))
        return net

    def _states(self) -> list[Path]:
        raw = (self._directory / DENSE_FILE).read_bytes()
        net = PathNet(self._config.model)
        with torch.no_grad():
            for name, value in decode_tensors(raw, layout_of(raw)).items():
                net.get_parameter(name).copy_(value)
        files = []
        for level in self._topology.levels:
            vector = read_module(net, self._topology, ModuleID(level.index, 0))
            files.append(self._start.state_file(level.index))
            write_tensors(files[-1], tensors_of(ModuleState.initial(vector)))
        return files

    def _router(self) -> list[Path]:
        router = self._fit_router(self._start.rows("train"))
        write_atomically(self._start.router_file, router.to_bytes())
        return [self._start.router_file]

    def _fit_router(self, rows: Rows) -> Router:
        """The router that training begins with, fitted to a sample of the training rows."""
        routing, num_paths = self._config.routing, self._topology.num_paths
        if routing.method == "hash" or num_paths == 1:
            return HashRouter(num_paths=num_paths)
        prefixes = evenly_spread(rows[:, : routing.prefix_tokens], MAX_FIT_SEQUENCES)
        if routing.method == "tiny_lm":
            return train_tiny_lm_router(
                prefixes,
                self._config,
                device=self._device,
                on_progress=lambda done, total: self._progress("router", done, total),
            )
        features = self._start.feature_extractor(self._device)(prefixes)
        if len(prefixes) == len(rows):
            self._train_features = features
        by_level = routing.method in ("product_kmeans", "discriminative")
        num_centers = self._topology.shape if by_level else (num_paths,)
        return fit_centers(features, num_centers, self._config.seed)

    def _shards(self) -> list[Path]:
        sharding = shard_corpus(
            self._start,
            self._config,
            self._start.router(),
            self._directory,
            lambda done, total: self._progress("shards", done, total),
            features=self._start.feature_extractor(self._device),
            train_features_ND=self._train_features,
        )
        return [
            sharding.listing_file,
            *(self._start.shard_file(path) for path in self._topology.paths),
        ]


def _checkpoint_tokenizer(checkpoint: Path) -> bytes:
    file = checkpoint / TOKENIZER_FILE
    try:
        return file.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"cannot read {file}: {error.strerror}",
            hint="set dense_start.checkpoint to a directory with a Llama and its tokenizer.json",
        ) from error


def _batches(documents: Iterable[tuple[Split, str]]) -> Iterator[list[tuple[Split, str]]]:
    """The documents in lists, each of which ends when it has `_BATCH_CHARACTERS`."""
    batch: list[tuple[Split, str]] = []
    num_characters = 0
    for split, text in documents:
        batch.append((split, text))
        num_characters += len(text)
        if num_characters >= _BATCH_CHARACTERS:
            yield batch
            batch, num_characters = [], 0
    if batch:
        yield batch


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()
