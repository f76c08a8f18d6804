"""How long does a resume take here, and where does it go? `python -m tools.resume`."""

import click
import numpy as np

import djinn_zmq as djinn
from djinn_zmq.client.model import Model
from djinn_zmq.client.run import Checkpoint
from djinn_zmq.probe import command, tables
from djinn_zmq.probe.command import Asked, Place
from djinn_zmq.probe.rounds import Task
from djinn_zmq.probe.rungs import resuming
from djinn_zmq.probe.ways import has_lane
from djinn_zmq.spans import Spans


def cases_of(
    way: str, model: Model, point: Checkpoint, spans: dict[str, list[Spans]]
) -> dict[str, Task]:
    """Every kind of edit, to the logits and only until it is ready; each notes its spans."""
    row = djinn.Add(np.zeros(model.hidden_size, np.float32), at=(0, -1))
    asked = {"none": {}, "row": {"edits": [row]}, "all": {"hidden": np.asarray(point.hidden)}}
    return {
        (name := f"{way}, edited: {edit}, to: {end}"): resuming(
            point, model, spans.setdefault(name, []), ready=end == "ready", **options
        )
        for edit, options in asked.items()
        for end in ("ready", "logits")
    }


@click.command(cls=command.Tool)
@command.measuring(samples=100)
@command.serving_options
@click.option("--positions", type=click.IntRange(1), default=32, show_default=True, help="Tokens.")
@click.option("--layer", type=int, help="Layers before the stop. [default: half of them]")
def resume(asked: Asked, place: Place, positions: int, layer: int | None) -> None:
    """A resume, unedited, with one row edited, with all of it replaced; by every way there is.

    \b
    to: ready     until layer N+1 could run: what Djinn itself costs
    to: logits    the layers behind the stop and the head as well

    Below the table, the spans of each: durations measured inside the process that spent them and
    carried in the reply; "wire" is what nobody else accounts for.

    \b
      python -m tools.resume
      python -m tools.resume --shape small --positions 128 --layer 6
      python -m tools.resume --server 127.0.0.1:5556 --model smollm2 --idle-ms 50
    """
    results = command.begin("resume-tool", asked, {"positions": positions})
    spans: dict[str, list[Spans]] = {}
    with command.standing(place) as standing:
        cases: dict[str, Task] = {}
        for way in standing.endpoints:
            for lane in (False, True):
                model = standing.connect(way, lane=lane).model(standing.model)
                if lane and not has_lane(model):
                    continue
                point = command.stopped(model, positions, layer)
                name = f"{way} with lane" if lane else way
                cases |= cases_of(name, model, point, spans)
        results.settings |= {"model": model.name, "layer": point.layer, "nbytes": point.nbytes}
        command.take(asked, cases, standing.pids, results)
    command.show(f"resume after layer {point.layer} of {model.name}", results)
    for name, found in spans.items():
        results.tables[f"spans of {name}"] = rows_of(found[-asked.plan.samples :])
    click.echo("\n" + table_of(results.tables))
    command.finish(asked, results)


def rows_of(found: list[Spans]) -> list[dict]:
    """The median of each span, in the order of the path."""
    return [
        {
            "span": name,
            "median_us": float(np.median([one[place][1] for one in found])) / 1e3,
            "n": len(found),
        }
        for place, (name, _) in enumerate(found[0])
    ]


def table_of(by_case: dict[str, list[dict]]) -> str:
    """A case a row, a span a column, in microseconds."""
    names = list(dict.fromkeys(row["span"] for rows in by_case.values() for row in rows))
    names.sort(key=lambda name: name == "client decode")  # the last on every path
    lines = []
    for title, rows in by_case.items():
        spent = {row["span"]: row["median_us"] for row in rows}
        cells = [tables.number(spent[name]) if name in spent else "" for name in names]
        lines.append([title, *cells, str(rows[0]["n"])])
    return tables.aligned(["medians, us", *names, "n"], lines)


if __name__ == "__main__":
    resume(prog_name="python -m tools.resume")
