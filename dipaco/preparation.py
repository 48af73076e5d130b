"""From a corpus to everything a run begins with, in stages, each of which can be resumed.

    corpus -> tokenizer -> sequences -> dense start -> router -> shards

A stage is named by what it depends on: the parts of the configuration it reads and the stage
before. If a directory holds its result under that name, it is not done again, so an interrupted
preparation continues and a changed outer learning rate costs nothing.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from dipaco.checkpoint import ModuleState, encode_state, write_atomically
from dipaco.config import RunConfig
from dipaco.corpus import Document, is_validation, load_documents
from dipaco.errors import BadBytes
from dipaco.inner import PathTrainer
from dipaco.model import PathNet, initialize, read_module, write_module
from dipaco.routing import features, fit_router
from dipaco.sequences import rows_of
from dipaco.shards import Rows, Shard, split_into_shards
from dipaco.start import RUN_FILE, SEQUENCES_FILE, START_FILE, Start, single_path
from dipaco.tensors import decode_tensors, encode_tensors, layout_of
from dipaco.tokenizer import train_tokenizer
from dipaco.topology import ModuleID, PathID, Topology

Progress = Callable[[str, int, int], None]
"""Called with the name of a stage, the units done and the units in total."""

_TOKENIZE_BATCH = 256


def prepare_start(
    config: RunConfig,
    directory: Path,
    progress: Progress = lambda stage, done, total: None,
    *,
    device: torch.device | str = "cpu",
) -> Start:
    """Make `directory` hold the start of a run, doing only what is not done yet."""
    (directory / "shards").mkdir(parents=True, exist_ok=True)
    (directory / "states").mkdir(exist_ok=True)
    preparation = _Preparation(config, directory, progress, torch.device(device))
    shard_tokens = preparation.run()
    write_atomically(directory / RUN_FILE, config.to_toml().encode())
    listing = {
        "fingerprint": config.fingerprint(),
        "shard_tokens": {str(path): tokens for path, tokens in shard_tokens.items()},
    }
    write_atomically(directory / START_FILE, _json(listing))
    return Start.load(directory)


class _Preparation:
    """The stages, and what they leave in the directory."""

    def __init__(
        self, config: RunConfig, directory: Path, progress: Progress, device: torch.device
    ) -> None:
        self._config = config
        self._topology = Topology.of(config)
        self._start = Start(config, directory, {})
        self._directory = directory
        self._progress = progress
        self._device = device
        self._documents = cache(self._read_documents)

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

    def run(self) -> dict[PathID, int]:
        """All stages; returns the training tokens of each shard."""
        model, topology = self._config.model, self._config.topology
        key = self._stage("tokenizer", "", [self._config.corpus, model.vocab_size], self._tokenizer)
        prefix = self._config.routing.prefix_tokens
        key = self._stage("sequences", key, [model.sequence_tokens, prefix], self._sequences)
        dense = [self._config.seed, model, topology, self._dense_config.inner, self._dense_steps]
        key = self._stage("dense start", key, dense, self._dense_start)
        key = self._stage("router", key, [self._config.routing], self._router)
        self._stage("shards", key, [], self._shards)
        return {
            path: self._start.shard(path).num_tokens(model.pad_token)
            for path in self._topology.paths
        }

    def _stage(
        self, name: str, before: str, inputs: list[Any], work: Callable[[], Iterable[Path]]
    ) -> str:
        """Do `work`, which returns the files it wrote, unless it is done; return its key."""
        plain = [asdict(value) if hasattr(value, "__slots__") else value for value in inputs]
        key = hashlib.sha256(_json([name, before, plain])).hexdigest()
        record_file = self._directory / f"{name.replace(' ', '-')}.stage.json"
        if self._is_done(record_file, key):
            self._progress(name, 1, 1)
            return key
        record_file.unlink(missing_ok=True)
        files = {str(f.relative_to(self._directory)): f.stat().st_size for f in work()}
        write_atomically(record_file, _json({"key": key, "files": files}))
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

    def _read_documents(self) -> list[Document]:
        corpus = self._config.corpus
        documents = []
        for document in load_documents(corpus):
            documents.append(document)
            self._progress("corpus", len(documents), corpus.max_documents)
        self._progress("corpus", corpus.max_documents, corpus.max_documents)
        return documents

    def _tokenizer(self) -> list[Path]:
        fraction = self._config.corpus.valid_fraction
        texts = [d.text for d in self._documents() if not is_validation(d.source, fraction)]
        self._progress("tokenizer", 0, 1)
        tokenizer = train_tokenizer(texts, self._config.model.vocab_size)
        write_atomically(self._start.tokenizer_file, tokenizer.to_bytes())
        self._progress("tokenizer", 1, 1)
        return [self._start.tokenizer_file]

    def _sequences(self) -> list[Path]:
        tokenizer = self._start.tokenizer()
        documents = self._documents()
        tokens: dict[str, list[list[int]]] = {"train": [], "valid": []}
        for start in range(0, len(documents), _TOKENIZE_BATCH):
            batch = documents[start : start + _TOKENIZE_BATCH]
            encoded = tokenizer.encode_all([document.text for document in batch])
            for document, ids in zip(batch, encoded, strict=True):
                held_out = is_validation(document.source, self._config.corpus.valid_fraction)
                tokens["valid" if held_out else "train"].append(ids)
            self._progress("sequences", start + len(batch), len(documents))
        rows = {
            name: rows_of(
                ids,
                sequence_tokens=self._config.model.sequence_tokens,
                prefix_tokens=self._config.routing.prefix_tokens,
                end_token=self._config.model.end_token,
                pad_token=self._config.model.pad_token,
            )
            for name, ids in tokens.items()
        }
        file = self._directory / SEQUENCES_FILE
        write_atomically(
            file, encode_tensors({name: torch.from_numpy(part) for name, part in rows.items()})
        )
        return [file]

    def _read_sequences(self) -> dict[str, Rows]:
        raw = (self._directory / SEQUENCES_FILE).read_bytes()
        try:
            tensors = decode_tensors(raw, layout_of(raw))
        except ValueError as error:
            raise BadBytes(f"{SEQUENCES_FILE} is damaged: {error}", hint="delete it") from error
        return {name: tensor.numpy() for name, tensor in tensors.items()}

    def _dense_start(self) -> list[Path]:
        net = self._train_dense_start(self._read_sequences())
        files = []
        for level in self._topology.levels:
            vector = read_module(net, self._topology, ModuleID(level.index, 0))
            files.append(self._start.state_file(level.index))
            write_atomically(files[-1], encode_state(ModuleState.initial(vector)))
        return files

    def _train_dense_start(self, rows: dict[str, Rows]) -> PathNet:
        config = self._dense_config
        topology = Topology.of(config)
        path = topology.paths[0]
        net = PathNet(config.model)
        initialize(net, config.seed)
        shard = Shard(path=path, train=rows["train"], valid=rows["valid"])
        trainer = PathTrainer(config, topology, path, shard, device=self._device)
        for module in trainer.modules:
            trainer.write_module(module, read_module(net, topology, module))
        for step in range(self._dense_steps):
            trainer.train_step(step)
            self._progress("dense start", step + 1, self._dense_steps)
        for module in trainer.modules:
            write_module(net, topology, module, trainer.read_module(module))
        return net

    def _features(self, rows: Rows, done: int, total: int) -> torch.Tensor:
        return features(
            self._start.net().to(self._device),
            rows,
            prefix_tokens=self._config.routing.prefix_tokens,
            on_progress=lambda num_rows: self._progress("router", done + num_rows, total),
        )

    def _router(self) -> list[Path]:
        rows = self._read_sequences()
        num_train = len(rows["train"])
        total = num_train + len(rows["valid"])
        parts = {
            "train": self._features(rows["train"], 0, total),
            "valid": self._features(rows["valid"], num_train, total),
        }
        router = fit_router(parts["train"], self._topology.num_paths, self._config.seed)
        write_atomically(self._start.router_file, router.to_bytes())
        assigned = {name: torch.from_numpy(router.assign(part)) for name, part in parts.items()}
        file = self._directory / "assignment.safetensors"
        write_atomically(file, encode_tensors(assigned))
        return [self._start.router_file, file]

    def _shards(self) -> list[Path]:
        raw = (self._directory / "assignment.safetensors").read_bytes()
        assigned = {name: t.numpy() for name, t in decode_tensors(raw, layout_of(raw)).items()}
        rows = {name: (part, assigned[name]) for name, part in self._read_sequences().items()}
        shards = split_into_shards(self._topology, rows, self._config.seed)
        files = []
        for number, (path, shard) in enumerate(shards.items(), start=1):
            files.append(self._start.shard_file(path))
            write_atomically(files[-1], shard.to_bytes())
            self._progress("shards", number, len(shards))
        return files


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()
