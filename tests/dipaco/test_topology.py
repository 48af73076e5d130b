import contextlib
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dipaco.config import RunConfig, TopologyConfig
from dipaco.topology import ModuleID, PathID, Topology

TINY = RunConfig.from_toml((Path(__file__).parents[2] / "examples/tiny.toml").read_text())


@st.composite
def topologies(draw: st.DrawFn) -> tuple[RunConfig, Topology]:
    levels = tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=3)))
    private = draw(st.lists(st.integers(0, 9), unique=True, max_size=10 - len(levels)))
    config = replace(
        TINY,
        model=replace(TINY.model, num_blocks=10),
        topology=TopologyConfig(
            levels=levels,
            path_specific_blocks=tuple(private),
            path_specific_embedding=draw(st.booleans()),
        ),
    )
    return config, Topology.of(config)


@given(topologies())
def test_every_path_is_the_whole_network_once(drawn: tuple[RunConfig, Topology]) -> None:
    config, topology = drawn
    for path in topology.paths:
        modules = topology.modules_of(path)
        assert [module.level for module in modules] == list(range(len(topology.levels)))
        blocks = sorted(b for module in modules for b in topology.blocks_of(module))
        assert blocks == list(range(config.model.num_blocks))


@given(topologies())
def test_paths_and_modules_agree(drawn: tuple[RunConfig, Topology]) -> None:
    _, topology = drawn
    assert list(topology.paths) == sorted(set(topology.paths))
    assert len(topology.paths) == topology.num_paths
    for module in topology.modules:
        through = topology.paths_through(module)
        assert through == tuple(p for p in topology.paths if module in topology.modules_of(p))
        assert topology.num_paths_through(module) == len(through) > 0


@given(topologies())
def test_numbers_and_text_round_trip(drawn: tuple[RunConfig, Topology]) -> None:
    _, topology = drawn
    for index, path in enumerate(topology.paths):
        assert topology.path_index(path) == index
        assert topology.path_at(index) == path
        assert PathID.parse(str(path)) == path
    for module in topology.modules:
        assert ModuleID.parse(str(module)) == module


@given(st.text(alphabet="0123456789.-+ ٣a", max_size=8))
def test_parse_accepts_only_what_str_gives(text: str) -> None:
    for kind in (PathID, ModuleID):
        with contextlib.suppress(ValueError):
            assert str(kind.parse(text)) == text


def test_levels_are_split_evenly_and_thousands_of_paths_are_cheap() -> None:
    config = replace(
        TINY,
        model=replace(TINY.model, num_blocks=12),
        topology=TopologyConfig(levels=(181, 181), path_specific_blocks=(0, 5, 11)),
    )
    topology = Topology.of(config)
    assert [level.blocks for level in topology.levels] == [
        (),
        (1, 2, 3, 4, 6),
        (7, 8, 9, 10),
        (0, 5, 11),
    ]
    path = PathID((180, 3))
    assert topology.modules_of(path)[3] == ModuleID(3, 180 * 181 + 3)
    assert topology.num_paths_through(ModuleID(1, 0)) == 181
    assert "paths" not in vars(topology)


@pytest.mark.parametrize("path", [PathID((2, 0)), PathID((0,)), PathID((-1, 0))])
def test_unknown_paths_and_modules_are_refused(path: PathID) -> None:
    topology = Topology.of(TINY)
    with pytest.raises(ValueError, match="not in a topology"):
        topology.modules_of(path)
    with pytest.raises(ValueError, match="not in a topology"):
        topology.paths_through(ModuleID(1, 2))
