"""What does a request cost that asks for nothing? `python -m tools.noop`."""

import click

from djinn_zmq.probe import command
from djinn_zmq.probe.command import Asked, Place
from djinn_zmq.probe.results import NotMeasured
from djinn_zmq.probe.ways import has_lane

SERVER, ENGINE, LANE = "{}: server only", "{}: server and engine", "{}: lane to the engine"


@click.command(cls=command.Tool)
@command.measuring(samples=500)
@command.serving_options
def noop(asked: Asked, place: Place) -> None:
    """The no-op: to Djinn's server and back, through it to the engine, and by the lane.

    It is the fixed cost of every request. Each way that the server offers is measured, all in turns.

    \b
    server only          one process wakes: the ROUTER's
    server and engine    two: what any request to a model takes at least
    lane to the engine   shared memory and a doorbell; the server sleeps on

    \b
      python -m tools.noop
      python -m tools.noop --idle-ms 50          # as an interactive user meets it
      python -m tools.noop --server tcp://127.0.0.1:5556

    `python -m bench.noop` compares it with bare echoes and with gRPC, and many clients at once.
    """
    results = command.begin("noop-tool", asked, {"server": place.server or "own"})
    with command.standing(place) as standing:
        cases = {}
        for way in standing.endpoints:
            server = standing.connect(way)
            cases[SERVER.format(way)] = server.ping
            cases[ENGINE.format(way)] = server.model(standing.model).ping
            beside = standing.connect(way, lane=True).model(standing.model)
            if has_lane(beside):
                cases[LANE.format(way)] = beside.ping
        if not any(LANE.format(way) in cases for way in standing.endpoints):
            why = "the server gave this client none: it needs ipc, and the same user"
            results.not_measured.append(NotMeasured("lane to the engine", why))
        command.take(asked, cases, standing.pids, results)
    command.show("no-op", results)
    command.finish(asked, results)


if __name__ == "__main__":
    noop(prog_name="python -m tools.noop")
