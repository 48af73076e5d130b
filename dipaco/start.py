"""Everything a run begins with, in a directory that `dipaco.preparation` filled."""

import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from dipaco.checkpoint import ModuleState, decode_state
from dipaco.config import RoundsConfig, RunConfig, TopologyConfig
from dipaco.digest import BlobIndex, index_of_file
from dipaco.errors import ConfigError
from dipaco.model import PathNet, num_parameters, write_module
from dipaco.routing import Router
from dipaco.shards import Shard
from dipaco.tokenizer import Tokenizer
from dipaco.topology import ModuleID, PathID, Topology

RUN_FILE = "run.toml"
START_FILE = "start.json"
TOKENIZER_FILE = "tokenizer.json"
SEQUENCES_FILE = "sequences.safetensors"
ROUTER_FILE = "router.safetensors"


@dataclass(frozen=True)
class Start:
    """Everything a run begins with, in a directory. Files are read when they are asked for."""

    config: RunConfig
    directory: Path
    shard_tokens: dict[PathID, int]

    @classmethod
    def load(cls, directory: Path) -> "Start":
        """A finished preparation; ConfigError if there is none, or it is of another version."""
        try:
            config = RunConfig.from_toml((directory / RUN_FILE).read_text())
            listing = json.loads((directory / START_FILE).read_text())
            shard_tokens = {PathID.parse(p): int(n) for p, n in listing["shard_tokens"].items()}
            fingerprint = listing["fingerprint"]
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise ConfigError(
                f"{directory} holds no finished preparation", hint="prepare the run again"
            ) from error
        if fingerprint != config.fingerprint():
            raise ConfigError(
                f"{RUN_FILE} in {directory} was changed after the preparation",
                hint="prepare the run again; finished stages are kept",
            )
        return cls(config, directory, shard_tokens)

    @cached_property
    def topology(self) -> Topology:
        """The run's topology."""
        return Topology.of(self.config)

    @property
    def tokenizer_file(self) -> Path:
        """The tokenizer, a blob."""
        return self.directory / TOKENIZER_FILE

    @property
    def router_file(self) -> Path:
        """The router, a blob."""
        return self.directory / ROUTER_FILE

    def shard_file(self, path: PathID) -> Path:
        """The shard of a path, a blob."""
        return self.directory / "shards" / f"{path}.safetensors"

    def state_file(self, level: int) -> Path:
        """The state that all modules of a level start from, a blob."""
        return self.directory / "states" / f"level-{level}.safetensors"

    def index(self, file: Path) -> BlobIndex:
        """Name and chunks of one of the files above."""
        return index_of_file(file)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer."""
        raw = self.tokenizer_file.read_bytes()
        model = self.config.model
        return Tokenizer.from_bytes(
            raw,
            vocab_size=model.vocab_size,
            end_token=model.end_token,
            pad_token=model.pad_token,
        )

    def router(self) -> Router:
        """The router."""
        return Router.from_bytes(
            self.router_file.read_bytes(),
            num_paths=self.topology.num_paths,
            width=self.config.model.width,
        )

    def shard(self, path: PathID) -> Shard:
        """The shard of a path."""
        return Shard.from_bytes(
            self.shard_file(path).read_bytes(),
            path=path,
            sequence_tokens=self.config.model.sequence_tokens,
            vocab_size=self.config.model.vocab_size,
        )

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


def single_path(config: RunConfig, num_steps: int) -> RunConfig:
    """The run in which one path is the whole network: a dense model, for `num_steps` steps."""
    rounds = RoundsConfig(num_rounds=1, inner_steps=max(num_steps, 1), round_seconds=1.0)
    return replace(config, topology=TopologyConfig(levels=(1,)), rounds=rounds)
