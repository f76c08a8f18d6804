"""Which way a client's requests take: a figure by the lane must have gone by the lane."""

from djinn_zmq.client.model import Model


def has_lane(model: Model) -> bool:
    """Do requests of *model*'s session go by a lane? Asks with a no-op, which makes one where it can."""
    model.ping()
    return any(True for _ in model.connection.lanes)
