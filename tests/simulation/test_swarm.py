"""The whole swarm under a virtual clock: agreement, oracle parity, kills, late joiners."""

from pathlib import Path

import torch

from tests.lab import certified_states, lab, little_config
from tests.virtual_clock import run_virtual

torch.set_num_threads(1)


def test_four_peers_agree_on_every_version(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with lab(tmp_path, little_config()) as place:
            everyone = [await place.bootstrap()]
            everyone += [await place.join(f"peer{n}") for n in range(4)]
            await place.until(
                lambda: all(p.seen("finished") for p in everyone[1:]), within=200, what="the end"
            )
            assert {p.seen("path")[-1]["path"] for p in everyone[1:]} == {"0.0", "0.1", "1.0", "1.1"}
            states = certified_states(everyone)
            assert {version for _, version in states} == {1, 2, 3, 4}
            assert all(len(digests) == 1 for digests in states.values())
            assert not any(p.seen("error") for p in everyone)
            for entry in everyone[0].seen("version"):
                assert len(entry["contributors"]) == (4 if entry["module"] == "0.0" else 2)

    run_virtual(scenario())
