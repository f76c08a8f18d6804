"""Results as JSON: one file a run, whole or not there at all."""

import json
import os
import tempfile
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from djinn_zmq.probe.fits import Fit
from djinn_zmq.probe.machine import Machine
from djinn_zmq.probe.pinning import Pinned
from djinn_zmq.probe.samples import Ratio, Samples

SCHEMA = 1  # raised when a field changes its meaning or goes; new fields do not raise it


@dataclass(frozen=True, slots=True)
class NotMeasured:
    """A figure that this run was asked for and does not have, and the reason."""

    what: str
    why: str

    def __str__(self) -> str:
        return f"not measured: {self.what}: {self.why}"

    def as_json(self) -> dict[str, Any]:
        return {"what": self.what, "why": self.why}


@dataclass(frozen=True, slots=True)
class Check:
    """Something that had to hold, and whether it did. held: None: it could not be found out."""

    what: str
    held: bool | None
    found: str

    def __str__(self) -> str:
        verdict = {True: "held", False: "MISSED", None: "not measured"}[self.held]
        return f"{verdict}: {self.what}: {self.found}"

    def as_json(self) -> dict[str, Any]:
        return {"what": self.what, "held": self.held, "found": self.found}


@dataclass(slots=True)
class Results:
    """What one run of a benchmark found.

    settings: the options it ran with. tables: figures that are not durations, by name, each a list
    of rows with an "n" of their own. not_measured: what was asked for and could not be had.
    """

    bench: str
    machine: Machine
    settings: dict[str, Any]
    pinned: list[Pinned] = field(default_factory=list)
    samples: list[Samples] = field(default_factory=list)
    ratios: list[Ratio] = field(default_factory=list)
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    fits: list[Fit] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    not_measured: list[NotMeasured] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "bench": self.bench,
            "taken_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": self.machine.as_json(),
            "versions": self.machine.versions,
            "settings": self.settings,
            "pinned": [one.as_json() for one in self.pinned],
            "samples": [one.as_json() for one in self.samples],
            "ratios": [one.as_json() for one in self.ratios],
            "fits": [one.as_json() for one in self.fits],
            "checks": [one.as_json() for one in self.checks],
            "not_measured": [one.as_json() for one in self.not_measured],
            "tables": self.tables,
        }


def write(results: Results, path: Path) -> None:
    """Write *results* to *path*. A reader sees the file as it was or as it is, never half of it."""
    write_json(results.as_json(), path)


def write_json(value: Any, path: Path) -> None:
    """The same for any JSON value. Raises ValueError for what is no number."""
    text = _dumps(value)
    fd, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(fd, "w") as file:
            file.write(text + "\n")
            os.fchmod(file.fileno(), 0o644)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _dumps(value: Any, indent: str = "") -> str:
    """JSON that a person can read: an object a line a field, samples all on one line."""
    inner = indent + " "
    if isinstance(value, dict) and any(isinstance(item, (dict, list)) for item in value.values()):
        lines = [f"{inner}{json.dumps(key)}: {_dumps(item, inner)}" for key, item in value.items()]
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return "[\n" + ",\n".join(inner + _dumps(item, inner) for item in value) + f"\n{indent}]"
    separators = (",", ":") if isinstance(value, list) else (", ", ": ")
    return json.dumps(value, allow_nan=False, separators=separators)
