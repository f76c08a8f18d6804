"""Results as JSON: one file a run, whole or not there at all."""

import json
import os
import tempfile
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from djinn_zmq.probe.machine import Machine
from djinn_zmq.probe.pinning import Pinned
from djinn_zmq.probe.samples import Ratio, Samples

SCHEMA = 1  # raised when a field changes its meaning or goes; new fields do not raise it


@dataclass(slots=True)
class Results:
    """What one run of a benchmark found.

    settings: the options it ran with. tables: figures that are not durations, by name, each a list
    of rows with an "n" of their own.
    """

    bench: str
    machine: Machine
    settings: dict[str, Any]
    pinned: list[Pinned] = field(default_factory=list)
    samples: list[Samples] = field(default_factory=list)
    ratios: list[Ratio] = field(default_factory=list)
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

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
            "tables": self.tables,
        }


def write(results: Results, path: Path) -> None:
    """Write *results* to *path*. A reader sees the file as it was or as it is, never half of it."""
    text = json.dumps(results.as_json(), indent=1, allow_nan=False)
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
