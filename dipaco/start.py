"""Everything a run begins with, in a directory that `dipaco.preparation` filled."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from dipaco.checkpoint import ModuleState, decode_state
from dipaco.config import RunConfig
from dipaco.digest import BlobIndex, index_of_file
from dipaco.document import Split
from dipaco.errors import ConfigError
from dipaco.model import PathNet, num_parameters, write_module
from dipaco.routing import MAX_FIT_SEQUENCES, FeatureExtractor, Router, feature_extractor
from dipaco.sequences import read_split
from dipaco.sharding import Sharding
from dipaco.shards import Rows, Shard, evenly_spread
from dipaco.tokenizer import Tokenizer
from dipaco.topology import ModuleID, PathID, Topology

RUN_FILE = "run.toml"
START_FILE = "start.json"
TOKENIZER_FILE = "tokenizer.json"


@dataclass(frozen=True)
class Start:
    """Everything a run begins with, in a directory. Files are read when they are asked for."""

    config: RunConfig
    directory: Path

    @classmethod
    def load(cls, directory: Path) -> "Start":
        """A finished preparation; ConfigError if there is none, or it is of another version."""
        try:
            config = RunConfig.from_toml((directory / RUN_FILE).read_text())
            fingerprint = json.loads((directory / START_FILE).read_text())["fingerprint"]
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise ConfigError(
                f"{directory} holds no finished preparation", hint="prepare the run again"
            ) from error
        if fingerprint != config.fingerprint():
            raise ConfigError(
                f"{RUN_FILE} in {directory} was changed after the preparation",
                hint="prepare the run again; finished stages are kept",
            )
        return cls(config, directory)

    @cached_property
    def topology(self) -> Topology:
        """The run's topology."""
        return Topology.of(self.config)

    @cached_property
    def sharding(self) -> Sharding:
        """The router and the shards that training begins with."""
        return Sharding(self.config, self.directory)

    @property
    def shard_tokens(self) -> dict[PathID, int]:
        """Training tokens of each path's shard."""
        return self.sharding.shard_tokens

    @property
    def tokenizer_file(self) -> Path:
        """The tokenizer, a blob."""
        return self.directory / TOKENIZER_FILE

    @property
    def router_file(self) -> Path:
        """The router, a blob."""
        return self.sharding.router_file

    def shard_file(self, path: PathID) -> Path:
        """The shard of a path, a blob."""
        return self.sharding.shard_file(path)

    def state_file(self, level: int) -> Path:
        """The state that all modules of a level start from, a blob."""
        return self.directory / "states" / f"level-{level}.safetensors"

    def index(self, file: Path) -> BlobIndex:
        """Name and chunks of one of the files above."""
        return index_of_file(file)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer."""
        model = self.config.model
        return Tokenizer.from_bytes(
            self.tokenizer_file.read_bytes(),
            vocab_size=model.vocab_size,
            end_token=model.end_token,
            pad_token=model.pad_token,
        )

    def rows(self, split: Split) -> Rows:
        """All sequences [n, T] of a split, read from disk as they are used."""
        return read_split(self.directory, split)

    def router_data(self) -> Rows:
        """The sequences [n, T] that no path trains on, to be scored by all; ConfigError if none.

        Few enough for their features and scores to be in memory, whatever the corpus.
        """
        rows = self.rows("router")
        if not len(rows):
            raise ConfigError(
                "there is no router data",
                hint="raise routing.router_fraction or corpus.max_documents, and prepare again",
            )
        return evenly_spread(rows, MAX_FIT_SEQUENCES)

    def router(self) -> Router:
        """The router."""
        return self.sharding.router()

    def shard(self, path: PathID) -> Shard:
        """The shard of a path."""
        return self.sharding.shard(path)

    def module_state(self, module: ModuleID) -> ModuleState:
        """Version 0 of a module."""
        size = num_parameters(self.config.model, self.topology, module)
        return decode_state(self.state_file(module.level).read_bytes(), num_parameters=size)

    def net(self) -> PathNet:
        """The dense start as a network: what every path is at version 0."""
        net = PathNet(self.config.model)
        for level in self.topology.levels:
            module = ModuleID(level.index, 0)
            write_module(net, self.topology, module, self.module_state(module).parameters)
        return net

    def feature_extractor(self, device: torch.device | str = "cpu") -> FeatureExtractor:
        """What routers see of a prefix, computed by the dense start on a device."""
        return feature_extractor(self.net().to(device))
