"""A path out of what a peer has on disk, while its swarm goes on."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from dht.errors import LocalFault
from dipaco.early_stopping import keep_if_best, read_best
from dipaco.evaluate import Evaluation
from dipaco.model import PathNet, read_module
from dipaco.start import Start
from dipaco.topology import PathID
from peer.cli import main
from peer.export import RunOnDisk
from peer.path_files import BEST_SUFFIX, OPTIMIZER_SUFFIX
from tests.lab import Lab, LabPeer, lab
from tests.virtual_clock import run_virtual


def state_dir(place: Lab, name: str) -> Path:
    """A peer's directory as it lies with a real one."""
    directory = place.directory / f"{name}-state"
    (directory / "runs" / "0123456789abcdef" / "blobs").mkdir(parents=True)  # `check` was here
    (directory / "runs" / place.run.digest[:16]).symlink_to(place.directory / name)
    return directory


def export(path: object, target: Path, directory: Path, *options: str) -> Result:
    arguments = ["export", str(path), str(target), "--state-dir", str(directory), *options]
    return CliRunner().invoke(main, arguments)


def assert_transformers_agrees(target: Path, net: PathNet) -> None:
    from transformers import AutoModelForCausalLM

    tokens = torch.randint(2, net.config.vocab_size, (2, 16))
    theirs = AutoModelForCausalLM.from_pretrained(target)
    with torch.no_grad():
        assert torch.allclose(net(tokens), theirs(tokens).logits, atol=1e-4)


def check_newest(place: Lab, path: PathID, target: Path) -> None:
    """The operator's node has every path, as its modules are certified."""
    log, topology = place.peers["bootstrap"].keeper.node.log, place.run.manifest.topology
    directory = state_dir(place, "bootstrap")
    done = export(path, target, directory)
    found = RunOnDisk(directory).path(str(path))
    assert f"path {path} after round {found.round}" in done.output
    assert found.round >= 1
    for module in topology.modules_of(path):
        certified = log.load_state(module).parameters
        assert torch.equal(read_module(found.net, topology, module), certified)
    assert_transformers_agrees(target, found.net)
    log.drop(topology.modules_of(path)[-1])  # its first state stays, but is not what was asked for
    with pytest.raises(LocalFault, match="is not here"):
        RunOnDisk(directory).path(str(path))


def check_best(place: Lab, peer: LabPeer, path: PathID, target: Path) -> None:
    """A volunteer has its own path at its best, takes it so unless told otherwise, and no other."""
    log, topology = place.peers["bootstrap"].keeper.node.log, place.run.manifest.topology
    sizes = {module: log.num_parameters(module) for module in topology.modules_of(path)}
    best = read_best(place.directory / peer.name / "paths" / f"{path}{BEST_SUFFIX}", sizes)
    assert best is not None
    rounds = [entry for entry in peer.seen("round") if entry["path"] == str(path)]
    perplexities = {entry["round"]: entry["perplexity"] for entry in rounds}
    assert perplexities[best.round] == min(perplexities.values())
    assert best.perplexity == pytest.approx(perplexities[best.round])
    directory = state_dir(place, peer.name)
    done = export(path, target, directory)
    assert f"path {path} after round {best.round}, where it did best here, is in" in done.output
    found = RunOnDisk(directory).path(str(path), early_stopped=True)
    assert_transformers_agrees(target, found.net)
    last = RunOnDisk(directory).path(str(path), early_stopped=False)
    assert last.round >= found.round
    assert not last.is_early_stopped
    other = next(p for p in topology.paths if p != path)
    with pytest.raises(LocalFault, match="at its best"):
        RunOnDisk(directory).path(str(other), early_stopped=True)
    assert "there is no path '7.7'" in export("7.7", target, directory).output
    # What did best on a shard that the path no longer has is left alone.
    file = place.directory / peer.name / "paths" / f"{path}{BEST_SUFFIX}"
    other_rows, raw = np.zeros((1, 3), np.uint16), file.read_bytes()
    perfect = Evaluation(nll_sum=0.0, num_tokens=1)
    assert keep_if_best(file, best.parameters, perfect, rows=other_rows, round_number=1)
    assert not RunOnDisk(directory).path(str(path)).is_early_stopped
    file.write_bytes(raw)
    assert RunOnDisk(directory).path(str(path)).is_early_stopped
    # Who moves on to another path knows no longer how well others do on this one.
    (place.directory / peer.name / "paths" / f"{other}{OPTIMIZER_SUFFIX}").touch()
    assert not RunOnDisk(directory).path(str(path)).is_early_stopped


# transformers' own warnings are its own affair.
@pytest.mark.filterwarnings("ignore")
def test_a_path_leaves_a_running_swarm_for_transformers(start: Start, tmp_path: Path) -> None:
    rounds = replace(start.config.rounds, num_rounds=100, round_seconds=20.0, blocking=True)
    prepared = replace(start, config=replace(start.config, rounds=rounds))

    async def scenario() -> None:
        async with lab(tmp_path / "lab", prepared.config, prepared=prepared) as place:
            await place.bootstrap()
            peers = [await place.join(f"peer{n}") for n in range(4)]
            await place.until(
                lambda: all(len(peer.seen("round")) >= 2 for peer in peers),
                within=200,
                what="two rounds of every path",
            )
            path = PathID.parse(peers[0].seen("path")[-1]["path"])
            check_newest(place, path, tmp_path / "newest")
            check_best(place, peers[0], path, tmp_path / "best")

    run_virtual(scenario())


def test_a_directory_without_a_run_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(LocalFault, match="none of the runs") as caught:
        RunOnDisk(tmp_path)
    assert "--state-dir" in caught.value.hint
