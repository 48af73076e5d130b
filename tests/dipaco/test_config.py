import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dipaco.config import RunConfig
from dipaco.errors import ConfigError

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.toml"))
TINY = RunConfig.from_toml((EXAMPLES[0].parent / "tiny.toml").read_text())

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


def changed(section: str, **values: object) -> dict[str, object]:
    result = TINY.to_dict()
    result[section] |= values
    return result


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.name)
def test_examples_round_trip(file: Path) -> None:
    config = RunConfig.from_toml(file.read_text())
    assert RunConfig.from_toml(config.to_toml()) == config
    assert RunConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_fingerprint_covers_values_not_spelling() -> None:
    assert RunConfig.from_dict(changed("outer", momentum=0)).fingerprint() == (
        RunConfig.from_dict(changed("outer", momentum=0.0)).fingerprint()
    )
    assert RunConfig.from_dict(changed("outer", momentum=0.5)).fingerprint() != TINY.fingerprint()


@pytest.mark.parametrize(
    ("section", "values", "message", "hint"),
    [
        ("inner", {"lerning_rate": 1}, "unknown key inner.lerning_rate", "learning_rate?"),
        ("inner", {"learning_rate": 7.0}, "inner.learning_rate is 7.0", "from 0.0 to 1.0"),
        ("inner", {"learning_rate": float("nan")}, "inner.learning_rate is nan", "finite"),
        ("model", {"width": "128"}, "model.width is '128'", "an integer"),
        ("model", {"width": True}, "model.width is True", "an integer"),
        ("model", {"num_heads": 5, "head_width": 0}, "model.width is 32", "multiple of twice"),
        ("model", {"num_blocks": 1}, "2 levels for 1 blocks", "one block of model.num_blocks"),
        ("topology", {"levels": []}, "number of topology.levels is 0", "from 1 to 16"),
        ("topology", {"levels": [65536, 65536]}, "number of paths", "from 1 to 65536"),
        ("topology", {"path_specific_blocks": [9]}, "path_specific_blocks is 9", "from 0 to 1"),
        ("outer", {"rescale": "cube"}, "outer.rescale is 'cube'", "'sqrt' or 'rda' or 'none'"),
        ("corpus", {"source": "json"}, "corpus.files is empty", "name the json files"),
        ("rounds", {"blocking": True, "staggered": True}, "are both set", "accepted: one of them"),
        ("routing", {"prefix_tokens": 33}, "routing.prefix_tokens is 33", "at most half"),
        (
            "routing",
            {"method": "discriminative", "phases": [2, 4]},
            "phases is [2, 4]",
            "less than",
        ),
    ],
)
def test_errors_name_the_key_and_the_way_out(
    section: str, values: dict[str, object], message: str, hint: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_dict(changed(section, **values))
    assert message in str(caught.value)
    assert hint in caught.value.hint


def test_missing_key_and_broken_toml() -> None:
    values = TINY.to_dict()
    del values["rounds"]["inner_steps"]
    with pytest.raises(ConfigError, match=r"rounds\.inner_steps is missing"):
        RunConfig.from_dict(values)
    with pytest.raises(ConfigError, match="not valid TOML") as caught:
        RunConfig.from_toml("name = ")
    assert caught.value.hint


def test_something_is_left_to_train_on() -> None:
    values = changed("routing", router_fraction=0.2)
    values["corpus"] |= {"valid_fraction": 0.4, "test_fraction": 0.4}
    with pytest.raises(ConfigError, match="are 1 in all"):
        RunConfig.from_dict(values)


@given(json_values)
def test_garbage_is_only_ever_a_config_error(garbage: object) -> None:
    with pytest.raises(ConfigError):
        RunConfig.from_dict(garbage)


@given(st.sampled_from(sorted(TINY.to_dict())), st.data())
def test_garbage_in_one_place(section: str, data: st.DataObject) -> None:
    values = TINY.to_dict()
    if isinstance(values[section], dict):
        values[section][data.draw(st.sampled_from(sorted(values[section])))] = data.draw(
            json_values
        )
    else:
        values[section] = data.draw(json_values)
    try:
        config = RunConfig.from_dict(values)
    except ConfigError:
        return
    assert RunConfig.from_toml(config.to_toml()) == config


def test_light_modules_do_not_import_torch() -> None:
    names = ("config", "topology", "errors", "digest", "cli")
    code = "import sys;" + "".join(f"import dipaco.{name};" for name in names)
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
