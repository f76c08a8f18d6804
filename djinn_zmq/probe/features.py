"""What this installation of Djinn can do, where a measurement depends on it.

A case that needs what is not there is reported by name as not measured; it is never left out in
silence and never stood in for.
"""

import inspect
from typing import Any

from djinn_zmq.client.model import Model
from djinn_zmq.client.run import Checkpoint
from djinn_zmq.client.server import connect

LANE = "lane" in inspect.signature(connect).parameters
TIERS = hasattr(Checkpoint, "evict")
WRITABLE = hasattr(Checkpoint, "writable")
WRITABLE_CUDA = hasattr(Checkpoint, "writable_cuda")
SESSIONS = hasattr(Model, "session")


def lane(wanted: bool) -> dict[str, Any]:
    """The options of `connect` for a client with or without the lane."""
    return {"lane": wanted} if LANE else {}
