"""A configuration as people write it: TOML to frozen dataclasses, and back.

Every section is a dataclass whose fields are its keys. What is wrong is said by the name of the
key, with what would be accepted.
"""

import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, Field, asdict, fields, is_dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from dipaco.errors import ConfigError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Table = TypeVar("Table", bound="DataclassInstance")


def parse_toml(text: str, name: str) -> dict[str, Any]:
    """The tables of a TOML text, which errors call `name`; ConfigError if it is none."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(
            f"{name} is not valid TOML: {error}",
            hint='look there; a text is in quotes, as in name = "my-run"',
        ) from error


def toml_of(values: Mapping[str, object]) -> str:
    """Plain values, and sections of them, as TOML."""
    lines = [_toml_line(k, v) for k, v in values.items() if not isinstance(v, dict)]
    for section, entries in values.items():
        if isinstance(entries, dict):
            lines += ["", f"[{section}]", *(_toml_line(k, v) for k, v in entries.items())]
    return "\n".join(lines) + "\n"


def plain_table(config: "DataclassInstance") -> dict[str, Any]:
    """The inverse of `read_table`: JSON-able values, a dictionary per section."""
    return {key: _plain(value) for key, value in asdict(config).items()}


def read_table(kind: type[Table], values: object, prefix: str = "") -> Table:
    """Build the dataclass `kind` from `values`, whose keys errors call `prefix` + key.

    ConfigError if `values` is no table, a key is unknown or missing, or a value is of another type;
    and whatever `kind` itself refuses.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{prefix.rstrip('.') or 'a configuration'} must be a table")
    known = {entry.name for entry in fields(kind)}
    for key in values:
        if key not in known:
            raise ConfigError(f"unknown key {prefix}{key}", hint=_suggestion(str(key), known))
    required = {entry.name for entry in fields(kind) if _is_required(entry)}
    for key in sorted(required - set(values)):
        raise ConfigError(f"{prefix}{key} is missing", hint=f"add it to the {_where(prefix)}")
    hints = get_type_hints(kind)
    return kind(**{key: _coerce(hints[key], values[key], f"{prefix}{key}") for key in values})


def _is_required(entry: Field[Any]) -> bool:
    return entry.default is MISSING and entry.default_factory is MISSING


def _suggestion(key: str, known: set[str]) -> str:
    matches = get_close_matches(key, sorted(known), n=1)
    return f"did you mean {matches[0]}?" if matches else f"known keys: {', '.join(sorted(known))}"


def _where(prefix: str) -> str:
    return f"section [{prefix.rstrip('.')}]" if prefix else "top of the configuration"


def _coerce(kind: Any, value: object, name: str) -> object:  # noqa: ANN401 - a type annotation
    """`value` as `kind`; ConfigError if it is something else."""
    if is_dataclass(kind) and isinstance(kind, type):
        return read_table(kind, value, f"{name}.")
    if get_origin(kind) is tuple and isinstance(value, list | tuple):
        return tuple(_coerce(get_args(kind)[0], entry, name) for entry in value)
    if get_origin(kind) is Literal and value in get_args(kind):
        return value
    if kind is float and type(value) in (int, float):
        return _finite(value, name)
    if isinstance(kind, type) and type(value) is kind:
        return value
    raise ConfigError(f"{name} is {value!r:.80}", hint=f"accepted: {_spell(kind)}")


def _finite(value: Any, name: str) -> float:  # noqa: ANN401 - int or float
    if abs(value) > 1e300 or math.isnan(value):
        raise ConfigError(f"{name} is {value!r:.80}", hint="accepted: a finite number")
    return float(value)


def _spell(kind: Any) -> str:  # noqa: ANN401 - a type annotation
    if get_origin(kind) is Literal:
        return " or ".join(repr(choice) for choice in get_args(kind))
    if get_origin(kind) is tuple:
        return f"a list of {_spell(get_args(kind)[0])}"
    words = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}
    return words.get(kind, "another value")


def _plain(value: object) -> Any:  # noqa: ANN401 - JSON has no narrower type
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _toml_line(key: str, value: object) -> str:
    # A JSON string, number, boolean or list of these is TOML too, but for the DEL character.
    return f"{key} = {json.dumps(value, ensure_ascii=False)}".replace("\x7f", "\\u007f")
