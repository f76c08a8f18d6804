"""Djinn: stop a transformer between two layers, look, edit, go on.

import djinn_zmq as djinn

with djinn.connect() as server:
    model = server.model("tiny")
    run = model.run("the capital of france is", stop_at=2)
    done = run.checkpoint.resume(edits=[djinn.Scale(0.0, at=(0, -2))])
    print(done.top(5))
"""

import importlib
from typing import TYPE_CHECKING, Any

from djinn_zmq.client.edits import Add, Lerp, Patch, Project, Scale, Set, Skip, Zero
from djinn_zmq.client.looks import Diff, Lens, Top
from djinn_zmq.client.model import Model
from djinn_zmq.client.run import Checkpoint, Run
from djinn_zmq.client.server import Server, connect
from djinn_zmq.client.stops import Break, HasNaN, Norm, Step, Token
from djinn_zmq.errors import DjinnError
from djinn_zmq.version import __version__

if TYPE_CHECKING:
    from djinn_zmq.client.batch import Batch
    from djinn_zmq.client.generation import Generation
    from djinn_zmq.client.local import local
    from djinn_zmq.client.talk import Session

__all__ = [
    "Add",
    "Batch",
    "Break",
    "Checkpoint",
    "Diff",
    "DjinnError",
    "Generation",
    "HasNaN",
    "Lens",
    "Lerp",
    "Model",
    "Norm",
    "Patch",
    "Project",
    "Run",
    "Scale",
    "Server",
    "Session",
    "Set",
    "Skip",
    "Step",
    "Token",
    "Top",
    "Zero",
    "__version__",
    "connect",
    "local",
]

# What a client of a running server need not import to stop a run and resume it, and where that is.
_LATER = {"Batch": "batch", "Generation": "generation", "Session": "talk", "local": "local"}


def __getattr__(name: str) -> Any:
    """The names of `_LATER`, on first use."""
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f"{__name__}.client.{_LATER[name]}"), name)
    return globals().setdefault(name, found)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
