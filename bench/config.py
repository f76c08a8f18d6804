"""What an experiment is told: a YAML file, and options that stand above it.

Every key is checked before anything is started; what is wrong is said in one sentence.
"""

import runpy
import sys
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin

import yaml

from djinn_zmq.errors import RequestError

BASELINES = (
    "recompute", "manual_offload", "eager", "djinn", "saving", "nnsight", "prototype", "bare",
)  # fmt: skip
TRANSPORTS = ("lane", "ipc", "tcp")
EDITS = ("none", "row", "all", "in_place", "row_in_place")
ENDS = ("ready", "logits")
TIERS = ("device", "host", "disk")

T = TypeVar("T")


def _one_of(allowed: Sequence[str], default: Sequence[str]) -> Any:
    return field(default=tuple(default), metadata={"allowed": tuple(allowed)})


@dataclass(frozen=True, slots=True)
class ResumeLatency:
    """The resume experiment. model: a shape (random weights), a served name, a directory, a hub id.

    device: "cpu", "cuda:N", or "auto": a named server's, else a GPU where there is one.
    layers: to stop at; empty: five, spread over the model. max_length: tokens of the prompt.
    repeat: rounds in which all cases take their turn, every second one backwards: an even number is
    fair. per_turn: timed calls in each turn.
    idle_ms: sleep before each call, as a person at work gives. spin_us: that an own server's ends, and
    the client's of a lane, stay awake after a message. without: cases whose name contains one
    of these are left out.
    transports, edits, ends, tiers: of Djinn's resume. Each is varied alone, the others at their
    first value; with `every_combination` all with all.
    """

    model: str = "llama-2-13b"
    device: str = "auto"
    dtype: str = "auto"
    threads: int = 1
    layers: tuple[int, ...] = ()
    max_length: int = 1031
    warmup: int = 3
    repeat: int = 6
    per_turn: int = 5
    idle_ms: float = 0.0
    spin_us: int = 0
    without: tuple[str, ...] = ()
    server: str | None = None
    key: str | None = None
    baselines: tuple[str, ...] = _one_of(BASELINES, BASELINES)
    transports: tuple[str, ...] = _one_of(TRANSPORTS, TRANSPORTS)
    edits: tuple[str, ...] = _one_of(EDITS, EDITS)
    ends: tuple[str, ...] = _one_of(ENDS, ENDS)
    tiers: tuple[str, ...] = _one_of(TIERS, TIERS)
    every_combination: bool = False
    output_dir: str = "resume-latency"

    def __post_init__(self) -> None:
        for name in ("threads", "max_length", "repeat", "per_turn"):
            _at_least(self, name, 1)
        _at_least(self, "warmup", 0)
        _at_least(self, "idle_ms", 0)
        _at_least(self, "spin_us", 0)
        if any(layer < 0 for layer in self.layers):
            raise RequestError(f"layers {list(self.layers)}: a layer is at least 0")


def spread(count: int) -> list[int]:
    """Five of a model's *count* layers: 1, 10, 20, 30 and 40 of 40."""
    return sorted({max(1, round(part * count)) for part in (0.025, 0.25, 0.5, 0.75, 1.0)})


def only(baseline: str) -> None:
    """The resume experiment with nothing but this: what `python -m bench.recompute` and the others are.
    As a command, because it imports them."""
    sys.argv[1:1] = ["--baselines", baseline]
    runpy.run_module("bench.resume_latency", run_name="__main__", alter_sys=True)


def _at_least(config: Any, name: str, least: int) -> None:
    value = getattr(config, name)
    if value < least:
        raise RequestError(f"{name} is {value}: it must be at least {least}")


def read(kind: type[T], path: Path | None, over: Mapping[str, Any]) -> T:
    """The configuration in *path* (None: only defaults), with *over* above it.

    Raises RequestError for a file that cannot be read, a key that does not exist, a value of the
    wrong type.
    """
    found: dict[str, Any] = {}
    if path is not None:
        found = _mapping(path)
    place = "" if path is None else f"{path}: "
    return build(kind, {**found, **over}, place)


def build(kind: type[T], values: Mapping[str, Any], place: str = "") -> T:
    """A dataclass from plain values, each checked against the field's type."""
    known = {one.name: one for one in fields(kind)}  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            raise RequestError(
                f'{place}there is no key "{key}": allowed are {", ".join(sorted(known))}'
            )
    made = {
        key: _value(known[key].type, value, f"{place}{key}", known[key].metadata.get("allowed"))
        for key, value in values.items()
    }
    return kind(**made)


def _mapping(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text())
    except OSError as exc:
        raise RequestError(f"{path} cannot be read: {exc.strerror}") from exc
    except yaml.YAMLError as exc:
        raise RequestError(f"{path} is no YAML: {' '.join(str(exc).split())}") from exc
    if not isinstance(found, dict):
        raise RequestError(f"{path} holds {type(found).__name__}: keys and values are wanted")
    return found


def _value(kind: Any, value: Any, where: str, allowed: Sequence[str] | None) -> Any:
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        choices = get_args(kind)
        if value is None and type(None) in choices:
            return None
        kind = next(one for one in choices if one is not type(None))
        return _value(kind, value, where, allowed)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            value = (value,)
        items = tuple(_value(get_args(kind)[0], item, where, None) for item in value)
        for item in items:
            if allowed is not None and item not in allowed:
                raise RequestError(f'{where}: "{item}": allowed are {", ".join(allowed)}')
        return items
    if hasattr(kind, "__dataclass_fields__"):
        if not isinstance(value, dict):
            raise RequestError(f"{where} is {value!r}: keys and values are wanted")
        return build(kind, value, f"{where}.")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise RequestError(f"{where} is {value!r}: it must be of type {kind.__name__}")
    return value
