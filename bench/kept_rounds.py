"""The rounds of a long measurement, put away one by one, so that an interruption costs one.

A line of JSON each: first what is measured and where, then the rounds. A run goes on only from rounds
of the same cases, settings, machine and versions; it counts the sittings, for who wants to know.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from djinn_zmq.errors import RequestError
from djinn_zmq.probe.results import Results
from djinn_zmq.probe.rounds import Turn
from djinn_zmq.probe.samples import Samples

FREE = ("repeat", "output_dir", "server", "key")  # settings that may differ between sittings


class KeptRounds:
    def __init__(self, path: Path, results: Results, names: Sequence[str]) -> None:
        """names: of the cases, in order."""
        self.path = path
        self.sittings = 1
        self._names = list(names)
        self._rounds: list[dict[str, list[float]]] = []
        settings = {key: value for key, value in results.settings.items() if key not in FREE}
        machine = results.machine.as_json()
        self._about = {
            "cases": self._names,
            "settings": settings,
            "machine": [machine["cpu"], machine["cores"], machine["gpus"]],
            "versions": results.machine.versions,
        }

    @property
    def count(self) -> int:
        return len(self._rounds)

    def load(self, *, fresh: bool) -> int:
        """How many rounds are there already. fresh: forget them.

        Raises RequestError where they are of another measurement.
        """
        lines = [] if fresh or not self.path.exists() else self.path.read_text().splitlines()
        found = [one for one in map(_parsed, lines) if one is not None]
        if not found:
            self.path.write_text(json.dumps(self._about))
            return 0
        self._check(found[0])
        self._rounds = [one["round"] for one in found if "round" in one]
        self.sittings = 2 + sum("sitting" in one for one in found)
        self._append({"sitting": self.sittings})
        return self.count

    def _check(self, about: dict[str, Any]) -> None:
        about = json.loads(json.dumps(about))
        for key, value in json.loads(json.dumps(self._about)).items():
            if about.get(key) != value:
                raise RequestError(
                    f"{self.path} holds rounds of another measurement ({key} differ): use --fresh to "
                    "begin anew, or another --output-dir"
                )

    def add(self, taken: Mapping[str, Turn]) -> None:
        turn = {name: [float(f"{one:.6g}") for one in taken[name]] for name in self._names}
        self._rounds.append(turn)
        self._append({"round": turn})

    def _append(self, line: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write("\n" + json.dumps(line))
            file.flush()
            os.fsync(file.fileno())

    def samples(self, labels: Mapping[str, Mapping[str, Any]]) -> list[Samples]:
        return [
            Samples(name, np.array([one[name] for one in self._rounds], np.float64), labels[name])
            for name in self._names
        ]


def _parsed(line: str) -> dict[str, Any] | None:
    """None for a line that was being written when the machine stopped."""
    try:
        found: dict[str, Any] = json.loads(line)
    except json.JSONDecodeError:
        return None
    return found
