"""What keeping checkpoints costs a run that goes on to its end. `python -m bench.saving`."""

from typing import Any

import numpy as np

from bench.cases import INDEPENDENT, WHOLE, Found, Timed
from bench.config import only
from bench.djinn_resume import Client, Djinn

NAME = "saving"
NOTHING, ONE, ALL = "nothing", "after one layer", "after every layer"


def cases(found: Djinn, ids: np.ndarray) -> Found:
    """A whole run over the first transport, which keeps so much; ids: int64 (1, positions)."""
    client = found.first
    middle = client.model.num_layers // 2
    asked = {NOTHING: (), ONE: (middle,), ALL: tuple(range(1, client.model.num_layers + 1))}
    return [_case(client, ids, variant, save_at) for variant, save_at in asked.items()]


def _case(client: Client, ids: np.ndarray, variant: str, save_at: tuple[int, ...]) -> Timed:
    held: list[Any] = []

    def call() -> None:
        held.append(client.model.run(ids, save_at=save_at))

    def release() -> None:
        held.clear()
        client.model.ping()  # what is to be released goes ahead of the next request

    more = {"transport": client.transport, "kept": variant}
    return Timed(NAME, variant, INDEPENDENT, call, release, group=WHOLE, more=more)


if __name__ == "__main__":
    only(NAME)
