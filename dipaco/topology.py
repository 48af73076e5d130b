"""Levels, modules and paths: which module holds which blocks, and which path uses it.

A network is cut into levels. Level 0 holds the embedding, the head if it is not tied with that,
and the final norm. Levels 1 to L are the configured ones: consecutive blocks, several
interchangeable modules each. A last level, where configured, holds the path-specific blocks. A
path picks one expert in each *configured* level; the modules of level 0 and of the last level
follow from it.

Unless it is path-specific, the embedding is one module that all paths share. The paper does not say
where it belongs; the size of its 8x8, 1.2 billion parameters, suggests that every module of some
level has one of its own.

Pure and cheap: nothing enumerates the paths unless asked for them.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from math import prod

from dipaco.config import RunConfig

_MAX_TEXT = 128  # a path has at most 16 levels of at most five digits and a dot
_NUMBERS = re.compile(r"(0|[1-9][0-9]{0,5})(\.(0|[1-9][0-9]{0,5}))*", re.ASCII)


def _parse_numbers(text: str) -> tuple[int, ...]:
    if len(text) > _MAX_TEXT or not _NUMBERS.fullmatch(text):
        raise ValueError(f"not numbers separated by dots: {text[:_MAX_TEXT]!r}")
    return tuple(int(number) for number in text.split("."))


@dataclass(frozen=True, order=True, slots=True)
class ModuleID:
    """One of the interchangeable modules of a level. Text form: `level.expert`."""

    level: int
    expert: int

    def __str__(self) -> str:
        return f"{self.level}.{self.expert}"

    @classmethod
    def parse(cls, text: str) -> "ModuleID":
        """The inverse of `str`; ValueError on anything else."""
        numbers = _parse_numbers(text)
        if len(numbers) != 2:
            raise ValueError(f"not a module, which is level.expert: {text!r}")
        return cls(*numbers)


@dataclass(frozen=True, order=True, slots=True)
class PathID:
    """One expert per configured level. Text form: the experts, separated by dots."""

    experts: tuple[int, ...]

    def __str__(self) -> str:
        return ".".join(map(str, self.experts))

    @classmethod
    def parse(cls, text: str) -> "PathID":
        """The inverse of `str`; ValueError on anything else."""
        return cls(_parse_numbers(text))


@dataclass(frozen=True, kw_only=True, slots=True)
class Level:
    """One level of interchangeable modules, all of which hold the same blocks.

    A path-specific one has a module per path: the expert is the number of the path.
    """

    index: int
    blocks: tuple[int, ...]  # ascending; none in level 0
    num_experts: int
    is_path_specific: bool


@dataclass(frozen=True)
class Topology:
    """All levels of a run, level 0 first; `shape` is the number of experts per configured level.

    A path's number is its position among all paths, sorted: the experts as digits, the last level's
    changing fastest.
    """

    shape: tuple[int, ...]
    levels: tuple[Level, ...]

    @classmethod
    def of(cls, config: RunConfig) -> "Topology":
        """The topology that a configuration describes."""
        shape, num_paths = config.topology.levels, config.topology.num_paths
        own_embedding = config.topology.path_specific_embedding
        own_blocks = tuple(sorted(config.topology.path_specific_blocks))
        shared_blocks = [b for b in range(config.model.num_blocks) if b not in own_blocks]
        parts = _split(shared_blocks, len(shape))
        num_embeddings = num_paths if own_embedding else 1
        embedding = Level(
            index=0, blocks=(), num_experts=num_embeddings, is_path_specific=own_embedding
        )
        shared = [
            Level(index=index, blocks=blocks, num_experts=num_experts, is_path_specific=False)
            for index, (num_experts, blocks) in enumerate(zip(shape, parts, strict=True), start=1)
        ]
        levels = [embedding, *shared]
        if own_blocks:
            levels.append(
                Level(
                    index=len(levels),
                    blocks=own_blocks,
                    num_experts=num_paths,
                    is_path_specific=True,
                )
            )
        return cls(shape, tuple(levels))

    @property
    def num_paths(self) -> int:
        """Number of paths."""
        return prod(self.shape)

    @cached_property
    def paths(self) -> tuple[PathID, ...]:
        """All paths, sorted."""
        return tuple(PathID(experts) for experts in product(*map(range, self.shape)))

    @cached_property
    def modules(self) -> tuple[ModuleID, ...]:
        """All modules, sorted."""
        return tuple(
            ModuleID(level.index, expert)
            for level in self.levels
            for expert in range(level.num_experts)
        )

    def level(self, index: int) -> Level:
        """The level of that index; ValueError if there is none."""
        if not 0 <= index < len(self.levels):
            raise ValueError(f"level {index} is not one of the {len(self.levels)} levels")
        return self.levels[index]

    def has_path(self, path: PathID) -> bool:
        """Whether the run has this path."""
        return len(path.experts) == len(self.shape) and all(
            0 <= expert < num_experts
            for expert, num_experts in zip(path.experts, self.shape, strict=True)
        )

    def has_module(self, module: ModuleID) -> bool:
        """Whether the run has this module."""
        return (
            0 <= module.level < len(self.levels)
            and 0 <= module.expert < self.levels[module.level].num_experts
        )

    def path_index(self, path: PathID) -> int:
        """Position of a path in `paths`; ValueError if the run has no such path."""
        if not self.has_path(path):
            raise ValueError(f"path {path} is not in a topology of {self.shape}")
        index = 0
        for expert, num_experts in zip(path.experts, self.shape, strict=True):
            index = index * num_experts + expert
        return index

    def path_at(self, index: int) -> PathID:
        """The inverse of `path_index`; ValueError if there are not that many paths."""
        if not 0 <= index < self.num_paths:
            raise ValueError(f"path number {index} of {self.num_paths}")
        experts = []
        for num_experts in reversed(self.shape):
            index, expert = divmod(index, num_experts)
            experts.append(expert)
        return PathID(tuple(reversed(experts)))

    def modules_of(self, path: PathID) -> tuple[ModuleID, ...]:
        """The modules that make up a path, one per level, level 0 first."""
        index = self.path_index(path)
        return tuple(
            ModuleID(level.index, self._expert(level, path, index)) for level in self.levels
        )

    def paths_through(self, module: ModuleID) -> tuple[PathID, ...]:
        """The paths that use a module, sorted; ValueError if the run has no such module."""
        self._require(module)
        level = self.levels[module.level]
        if level.is_path_specific:
            return (self.path_at(module.expert),)
        return tuple(self._shared_paths(level, module.expert))

    def num_paths_through(self, module: ModuleID) -> int:
        """Length of `paths_through` (the paper's P_{l,e}), without building it."""
        self._require(module)
        level = self.levels[module.level]
        return 1 if level.is_path_specific else self.num_paths // level.num_experts

    def blocks_of(self, module: ModuleID) -> tuple[int, ...]:
        """The transformer blocks a module holds, ascending; none for level 0."""
        self._require(module)
        return self.levels[module.level].blocks

    def _require(self, module: ModuleID) -> None:
        if not self.has_module(module):
            raise ValueError(f"module {module} is not in a topology of {self.shape}")

    @staticmethod
    def _expert(level: Level, path: PathID, path_index: int) -> int:
        if level.is_path_specific:
            return path_index
        return path.experts[level.index - 1] if level.index else 0

    def _shared_paths(self, level: Level, expert: int) -> Iterator[PathID]:
        choices = [range(num_experts) for num_experts in self.shape]
        if level.index:
            choices[level.index - 1] = range(expert, expert + 1)
        return (PathID(experts) for experts in product(*choices))


def _split(blocks: list[int], num_levels: int) -> list[tuple[int, ...]]:
    """Cut `blocks` into consecutive parts as even as possible, the longer ones first."""
    size, num_longer = divmod(len(blocks), num_levels)
    parts = []
    start = 0
    for level in range(num_levels):
        end = start + size + (level < num_longer)
        parts.append(tuple(blocks[start:end]))
        start = end
    return parts
