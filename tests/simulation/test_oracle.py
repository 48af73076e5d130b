"""A faultless exact swarm ends with the bytes that one machine computes, replicas included."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dipaco.config import TopologyConfig
from dipaco.reference import Options, train
from tests.lab import lab
from tests.little_run import little_config
from tests.virtual_clock import run_virtual

NUM_ROUNDS = 3


@pytest.mark.parametrize(("levels", "replicas"), [((2, 2), 1), ((2,), 2)])
def test_the_swarm_reproduces_the_oracle(
    tmp_path: Path, levels: tuple[int, ...], replicas: int
) -> None:
    async def scenario() -> tuple[dict[str, str], Any]:
        config = replace(
            little_config(num_rounds=NUM_ROUNDS, wire_format="int4"),
            topology=TopologyConfig(levels=levels),
        )
        async with lab(tmp_path / "swarm", config) as place:
            everyone = [await place.bootstrap()]
            everyone += [await place.join(f"peer{n}") for n in range(4)]
            await place.until(
                lambda: all(peer.seen("finished") for peer in everyone[1:]),
                within=200,
                what="the end",
            )
            log = everyone[0].keeper.node.log
            return {str(m): held.state for m, held in log.held.items()}, place.run

    states, run = run_virtual(scenario())
    sharding = SimpleNamespace(shard=run.shards.get, shard_tokens=run.manifest.shard_tokens)
    start: Any = SimpleNamespace(
        config=run.manifest.run_config,
        topology=run.manifest.topology,
        sharding=sharding,
        module_state=run.starts.get,
    )
    oracle = train(
        start, tmp_path / "oracle", num_rounds=NUM_ROUNDS, options=Options(replicas=replicas)
    )
    assert states == {str(module): digest for module, digest in oracle.digests.items()}
