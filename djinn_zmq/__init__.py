"""Djinn: stop a transformer between two layers, look, edit, go on.

import djinn_zmq as djinn

with djinn.connect() as server:
    model = server.model("tiny")
    run = model.run("the capital of france is", stop_at=2)
    done = run.checkpoint.resume(edits=[djinn.Scale(0.0, at=(0, -2))])
    print(done.top(5))
"""

from typing import Any

from djinn_zmq.client.batch import Batch
from djinn_zmq.client.edits import Add, Lerp, Patch, Project, Scale, Set, Skip, Zero
from djinn_zmq.client.generation import Generation
from djinn_zmq.client.looks import Diff, Lens, Top
from djinn_zmq.client.model import Model
from djinn_zmq.client.run import Checkpoint, Run
from djinn_zmq.client.server import Server, connect
from djinn_zmq.client.stops import Break, HasNaN, Norm, Step, Token
from djinn_zmq.client.talk import Session
from djinn_zmq.errors import DjinnError
from djinn_zmq.version import __version__

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


def __getattr__(name: str) -> Any:
    """`local` on first use: a client of a running server need not import what starts processes."""
    if name == "local":
        from djinn_zmq.client.local import local

        return local
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
