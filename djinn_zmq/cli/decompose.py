"""`djinn decompose`, also installed as `djinn-decompose`: where a resume's time goes."""

import click
import numpy as np

from djinn_zmq.probe import command, ladder, rungs
from djinn_zmq.probe.command import Asked, Place
from djinn_zmq.probe.results import Check
from djinn_zmq.probe.ways import has_lane


@click.command(cls=command.Tool)
@command.measuring(samples=200)
@command.serving_options
@click.option(
    "--transport",
    type=click.Choice(["ipc", "tcp"]),
    default="ipc",
    show_default=True,
    help="For an own server: the way to it. A --server's endpoint says it itself.",
)
@click.option(
    "--carry",
    type=click.Choice(["nothing", "activation"]),
    default="nothing",
    show_default=True,
    help="What every rung carries up: nothing but a message, or the whole activation, as a resume "
    "with hidden= does.",
)
@click.option(
    "--to",
    type=click.Choice(["logits", "ready"]),
    default="logits",
    show_default=True,
    help="How far the resume goes: to the logits, or only until it is ready at layer N+1.",
)
@click.option(
    "--positions",
    type=click.IntRange(1),
    default=32,
    show_default=True,
    help="Tokens of the prompt.",
)
@click.option("--layer", type=int, help="Layers before the stop. [default: half of them]")
@click.option(
    "--lane/--no-lane",
    "by_lane",
    default=True,
    help="Resume by the lane where this client has one. [default: lane]",
)
def decompose(
    asked: Asked,
    place: Place,
    transport: str,
    carry: str,
    to: str,
    positions: int,
    layer: int | None,
    by_lane: bool,
) -> None:
    """Where does a resume's time go? The ladder from the bare socket up, and whether it adds up.

    \b
    raw socket     the same bytes and an acknowledgement over TCP (for ipc: AF_UNIX)
    ZeroMQ         DEALER to ROUTER, in another process
    codec          the same with Djinn's messages made and read at both ends
    server         a no-op to Djinn's server
    engine         a no-op through the server to the engine
    lane           the no-op by shared memory, where this client has the lane
    between        the no-op once more, each behind a resume: its way is not warm any more
    resume         the whole

    All rungs carry the same number of bytes up and take turns in one run. A step is what a rung adds
    to the one below it. What a resume adds to a no-op is measured where it is spent: by the client's
    clock, by the spans in its reply, and, behind the last of these, by making its answer once more.
    The steps must explain the whole within 10 %; "rest" is what they do not.

    \b
      djinn-decompose
      djinn-decompose --server tcp://127.0.0.1:5556 --carry activation --json out.json
      python -m tools.decompose --shape small --positions 128 --to ready --plot out.png

    Against a server on another machine there is no bare echo to compare with: those rungs are named
    as not measured. Exit status 1 where the steps do not add up.
    """
    settings = {"carry": carry, "to": to, "positions": positions}
    results = command.begin("decompose", asked, settings)
    with command.standing(place) as standing:
        way = transport if transport in standing.endpoints else next(iter(standing.endpoints))
        server = standing.connect(way)
        model = server.model(standing.model)
        beside = standing.connect(way, lane=by_lane).model(standing.model)
        lane = beside if has_lane(beside) else None
        point = command.stopped(lane or model, positions, layer)
        results.settings |= {"model": model.name, "layer": point.layer, "endpoint": way}
        array = np.asarray(point.hidden) if carry == "activation" else None
        with rungs.standing(
            server, model, point, standing.folder, array=array, ready=to == "ready", lane=lane
        ) as built:
            taken = command.take(asked, built.cases, [*standing.pids, *built.pids], results)
    results.not_measured += built.not_measured
    count = taken[ladder.RESUME].n
    own_s = {rung: own[-count:] for rung, own in built.own_s.items()}
    found = ladder.decompose(
        taken, built.spans[-count:], own_s, built.inside_s[-count:], built.nbytes
    )
    results.settings["nbytes"] = found.nbytes
    results.tables["steps"] = found.rows()
    results.checks.append(
        Check("the steps add up to the whole", found.adds_up, f"{found.explained:.1%} of it")
    )
    command.show("rungs", results)
    end = "to the logits" if to == "logits" else "until layer N+1 could run"
    about = f"resume of {model.name} after layer {point.layer} {end}, {way}"
    click.echo(f"\n{about}\n{found}\n")

    def draw() -> object:
        from djinn_zmq.probe import drawing

        return drawing.stacked(f"Where the time goes: {about}", {way: found})

    command.finish(asked, results, draw)
    if not found.adds_up:
        raise click.ClickException(
            f"the steps explain {found.explained:.1%} of the whole: more than "
            f"{ladder.ADDS_UP:.0%} is missing or counted twice; is the machine busy?"
        )


def main() -> None:
    decompose(prog_name="djinn-decompose")


if __name__ == "__main__":
    main()
