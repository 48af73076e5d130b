"""What a person meets at the command line: instant help, one-line errors with a hint."""

import asyncio
import subprocess
import sys
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner, Result

from bootstrap.cli import main as bootstrap
from bootstrap.growth import requested_growth
from bootstrap.prepare import IDENTITY_FILE, MANIFEST_FILE
from dht.errors import LocalFault
from dipaco.cli import main as dipaco
from dipaco.errors import ConfigError
from dipaco.locking import working_in
from peer.cli import main as peer
from peer.config import PeerConfig
from peer.devices import choose_device
from peer.limits import check_free_disk
from peer.session import open_network
from tests.little_run import identity, little_config, make_run

PEER_ID = identity(7).peer_id
ADDRESS = f"/ip4/127.0.0.1/tcp/1/p2p/{PEER_ID}"
CONFIG = str(Path(__file__).parents[2] / "examples" / "tiny.toml")
RUN = make_run(little_config(), operator=identity(1), start_time=0.0)

HEAVY = "import sys; heavy = {'torch', 'hivemind', 'datasets', 'sklearn'} & set(sys.modules)"


@pytest.mark.parametrize(
    ("module", "command", "subcommands"),
    [
        ("peer.cli", "main", ["join", "status", "check", "export", "identity"]),
        ("bootstrap.cli", "main", ["prepare", "serve", "grow", "status"]),
        ("dipaco.cli", "main", ["train", "generate"]),
    ],
)
def test_help_imports_nothing_heavy(module: str, command: str, subcommands: list[str]) -> None:
    helps = [["--help"], *([name, "--help"] for name in subcommands)]
    program = (
        f"from {module} import {command} as main\n"
        f"for arguments in {helps!r}:\n"
        "    try:\n"
        "        main(arguments, standalone_mode=True)\n"
        "    except SystemExit as exit:\n"
        "        assert not exit.code\n"
        f"{HEAVY}\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Usage:") == len(helps)


@pytest.mark.parametrize(
    ("program", "arguments", "patched"),
    [
        (dipaco, ["generate", ".", "prompt"], "dipaco.trained.TrainedModel.load"),
        (peer, ["join", ADDRESS, "--quiet"], "peer.join.join"),
        (bootstrap, ["prepare", CONFIG, "target"], "bootstrap.prepare.prepare_run"),
    ],
)
def test_a_gpu_that_fails_is_one_line_and_a_hint(
    program: click.Group,
    arguments: list[str],
    patched: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)

    def fail(*_: object, **__: object) -> None:
        raise torch.AcceleratorError("CUDA error: unspecified launch failure\nCUDA kernel errors")

    monkeypatch.setattr(patched, fail)
    result = CliRunner().invoke(program, arguments)
    assert result.exit_code == 1
    error, empty, hint = result.stderr.strip().splitlines()
    assert error == "error: the GPU failed: unspecified launch failure"
    assert not empty
    assert hint.startswith("hint: try `--device cpu`")


def test_the_options_are_these() -> None:
    """A frozen list: a new option is a decision, not an accident."""
    options = {
        f"{name} {command_name}": sorted(
            option
            for parameter in command.params
            if isinstance(parameter, click.Option)
            for option in parameter.opts
            if option.startswith("--")
        )
        for name, group in (
            ("dipaco-peer", peer),
            ("dipaco-bootstrap", bootstrap),
        )
        for command_name, command in group.commands.items()
    }
    network = ["--announce-maddr", "--host-maddr", "--max-mbps"]
    volunteer = [
        "--state-dir",
        "--disk-limit",
        "--memory-limit",
        "--client-mode",
        "--relay-service",
    ]
    assert options == {
        "dipaco-peer join": sorted(
            [
                *(*network, *volunteer, "--compile", "--device", "--optimizer"),
                *("--quiet", "--threads", "--verbose"),
            ]
        ),
        "dipaco-peer status": ["--json", "--verbose"],
        "dipaco-peer check": sorted([*network, *volunteer, "--compile", "--device", "--verbose"]),
        "dipaco-peer export": ["--early-stopped", "--run", "--state-dir"],
        "dipaco-peer identity": ["--state-dir"],
        "dipaco-bootstrap status": ["--json", "--verbose"],
        "dipaco-bootstrap prepare": ["--device", "--threads", "--verbose"],
        "dipaco-bootstrap grow": ["--levels", "--verbose"],
        "dipaco-bootstrap serve": sorted(
            [*network, "--quiet", "--relay-service", "--start-in", "--verbose"]
        ),
    }


@pytest.mark.parametrize(
    "address", ["garbage", "/ip4/1.2.3.4/tcp/1", f"/ip4/999.2.3.4/tcp/1/p2p/{PEER_ID}"]
)
def test_a_malformed_address_is_a_usage_error_with_an_example(address: str) -> None:
    result = CliRunner().invoke(peer, ["join", address])
    assert result.exit_code == 2
    assert "is not the address of a peer" in result.output
    assert "hint: an address looks like /ip4/" in result.output


def test_a_malformed_listen_address_is_a_usage_error() -> None:
    result = CliRunner().invoke(peer, ["join", ADDRESS, "--host-maddr", "/ip4/0.0.0.0/udp/1"])
    assert result.exit_code == 2
    assert "/ip4/0.0.0.0/tcp/31337" in result.output


def test_a_peer_that_cannot_be_dialled_is_no_relay() -> None:
    result = CliRunner().invoke(peer, ["join", ADDRESS, "--client-mode", "--relay-service"])
    assert result.exit_code == 2
    assert "exclude each other" in result.output


@pytest.mark.swarm
def test_an_unreachable_address_is_one_line_and_a_hint(tmp_path: Path) -> None:
    arguments = ["join", ADDRESS, "--state-dir", str(tmp_path)]
    program = [sys.executable, "-c", "from peer.cli import main; main()", *arguments]
    program += ["--host-maddr", "/ip4/127.0.0.1/tcp/0", "--quiet"]
    done = subprocess.run(program, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    error, empty, hint = done.stderr.strip().splitlines()
    assert error.startswith("error: ")
    assert "127.0.0.1/tcp/1" in error
    assert not empty
    assert hint.startswith("hint: ")


@pytest.mark.parametrize(
    ("line", "message", "hint"),
    [
        ("widht = 3", "model.widht", "width"),
        ("width = 7", "model.width is 7", "accepted"),
    ],
)
def test_a_wrong_configuration_names_the_key(
    tmp_path: Path, line: str, message: str, hint: str
) -> None:
    text = Path(CONFIG).read_text()
    config = tmp_path / "run.toml"
    config.write_text(text.replace("width = 32\n", f"{line}\n", 1))
    result = CliRunner().invoke(bootstrap, ["prepare", str(config), str(tmp_path / "run")])
    assert result.exit_code == 1
    assert message in result.output
    assert "hint: " in result.output
    assert hint in result.output
    assert not (tmp_path / "run").exists()


def test_a_configuration_that_is_no_text_is_said_to_be_none(tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    config.write_bytes("name = 'tiny'".encode("utf-16"))
    result = CliRunner().invoke(bootstrap, ["prepare", str(config), str(tmp_path / "run")])
    assert result.exit_code == 1
    assert f"{config} is not a text file" in result.output


def test_growth_is_asked_for_in_the_directory_of_a_run_that_was_served(tmp_path: Path) -> None:
    def grow(levels: str) -> Result:
        return CliRunner().invoke(bootstrap, ["grow", str(tmp_path), "--levels", levels])

    never = grow("3,2")
    assert never.exit_code == 1
    assert "was never served" in never.output
    (tmp_path / MANIFEST_FILE).write_bytes(RUN.manifest.to_bytes())
    (tmp_path / IDENTITY_FILE).write_bytes(identity(1).to_bytes())
    for levels, why in (("1,2", "may only grow"), ("2,2", "they are the same"), ("x", "such as")):
        refused = grow(levels)
        assert refused.exit_code != 0
        assert why in refused.output
        assert requested_growth(tmp_path) is None
    done = grow("3,2")
    assert done.exit_code == 0
    assert f"dipaco-bootstrap serve {tmp_path}" in done.output
    assert requested_growth(tmp_path) == (3, 2)


def test_an_unprepared_directory_says_what_to_do(tmp_path: Path) -> None:
    result = CliRunner().invoke(bootstrap, ["serve", str(tmp_path)])
    assert result.exit_code == 1
    assert f"dipaco-bootstrap prepare CONFIG {tmp_path}" in result.output


def test_a_device_that_is_not_there_lists_those_that_are() -> None:
    config = PeerConfig(device="cuda:99")
    with pytest.raises(ConfigError, match="cuda:99") as caught:
        choose_device(config, RUN.manifest.run_config, RUN.manifest.topology)
    assert "available: cpu" in caught.value.hint


def test_a_disk_that_is_too_small_is_found_before_joining(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_free_disk(RUN.manifest, tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(LocalFault, match="this run needs") as caught:
        check_free_disk(RUN.manifest, tmp_path)
    assert "--state-dir" in caught.value.hint
    monkeypatch.setattr("peer.limits.disk_bytes", lambda _: 10**5)
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "state").write_bytes(bytes(range(100)) * 1000)
    check_free_disk(RUN.manifest, tmp_path)  # it took part before


def test_two_peers_do_not_share_a_state_directory(tmp_path: Path) -> None:
    async def second() -> None:
        async with open_network(PeerConfig(state_dir=tmp_path)):
            pytest.fail("both are running")

    with (
        working_in(tmp_path),
        pytest.raises(ConfigError, match="another process is at work in") as caught,
    ):
        asyncio.run(second())
    assert "--state-dir" in caught.value.hint


@pytest.mark.parametrize("run", ["/", "**", "*", "..", "[", "c"])
def test_a_run_to_export_is_named_by_its_beginning_and_by_no_pattern(
    tmp_path: Path, run: str
) -> None:
    (tmp_path / "runs" / "ab12" / "promises").mkdir(parents=True)
    arguments = ["export", "0.0", "target", "--state-dir", str(tmp_path), "--run"]
    result = CliRunner().invoke(peer, [*arguments, run])
    assert result.exit_code == 1
    assert "holds none of the runs asked for" in result.output
    named = CliRunner().invoke(peer, [*arguments, "ab"])
    assert "ab12` lacks the run's manifest" in named.output


def test_identity_prints_the_same_peer_id_again(tmp_path: Path) -> None:
    first, second = (
        CliRunner().invoke(peer, ["identity", "--state-dir", str(tmp_path)]) for _ in range(2)
    )
    assert first.output == second.output
    assert first.output.startswith("12D3KooW")
    assert (tmp_path / "identity").stat().st_mode & 0o777 == 0o600
