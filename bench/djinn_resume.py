"""What is to be compared: resuming a checkpoint through a Djinn server. `python -m bench.djinn_resume`.

    transport   lane, ipc, tcp
    end         ready: until layer N+1 could run; logits: the layers behind it and the head as well
    edits       none; row: a vector added to one; all: the activation replaced by another array;
                in_place: all of it rewritten in memory that the engine reads where it stands;
                row_in_place: a row rewritten in the engine's own GPU memory (CUDA IPC);
                what is edited in place is timed alone, and with the edit; a whole activation alone
                once more, written by one thread (`bench.writing`)
    tier        where the checkpoint lies when it is resumed: device, host, disk

Each is varied alone, the others at the first that there is; `every_combination` does all with all.
"""

import itertools
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import djinn_zmq as djinn
from bench.cases import Found, Timed
from bench.config import ResumeLatency, only
from bench.writing import AFTER_NUMPY, ALONE, WITH_EDIT, assigning, rewriting
from djinn_zmq.client.model import Model
from djinn_zmq.client.run import Checkpoint
from djinn_zmq.errors import RequestError
from djinn_zmq.probe.results import NotMeasured
from djinn_zmq.probe.rounds import Case
from djinn_zmq.probe.rungs import resuming
from djinn_zmq.probe.ways import has_lane
from djinn_zmq.spans import Spans

NAME = "djinn"
IN_PLACE = ("in_place", "row_in_place")


@dataclass(frozen=True, slots=True)
class InPlace:
    """view: what is edited and sent. edit: rewrites it. finish: waits for the edit's end where it only
    begins it. by_numpy: the same edit by one thread; None: a row has none."""

    view: Any
    edit: Case
    finish: Case | None = None
    by_numpy: Case | None = None


@dataclass(slots=True)
class Client:
    """One way to the server. points: checkpoints by layer, of one run. in_place: by layer and edit,
    one view for all cases, because a slab that is full of them has no spare slots beside them, and a
    resume without one is slower."""

    transport: str
    model: Model
    points: dict[int, Checkpoint] = field(default_factory=dict)
    in_place: dict[tuple[int, str], InPlace] = field(default_factory=dict)
    row: np.ndarray | None = None  # float32 (hidden_size,)


@dataclass(slots=True)
class Djinn:
    """All clients of the experiment. spans: by variant, of the resumes made so far."""

    clients: list[Client]
    missing: list[NotMeasured]
    spans: dict[str, list[Spans]] = field(default_factory=dict)

    @property
    def first(self) -> Client:
        return self.clients[0]


def connect(
    endpoints: dict[str, str], config: ResumeLatency, model: str, stack: ExitStack
) -> Djinn:
    """A client for each transport that is asked for and there. Raises Unreachable, UnknownModel.

    endpoints: "ipc", "tcp" → endpoint.
    """
    found = Djinn([], [])
    key = None if config.key is None else Path(config.key)
    for transport in config.transports:
        scheme = "ipc" if transport == "lane" else transport
        if scheme not in endpoints:
            why = f"the server that was named has no {scheme} endpoint for this program"
            found.missing.append(NotMeasured(f"djinn by {transport}", why))
            continue
        lane = transport == "lane"
        server = stack.enter_context(
            djinn.connect(
                endpoints[scheme], key=key, progress=None, lane=lane, spin_us=config.spin_us
            )
        )
        client = Client(transport, server.model(model))
        if lane and not has_lane(client.model):
            found.missing.append(NotMeasured("djinn by lane", "the server gave this client none"))
            continue
        found.clients.append(client)
    if not found.clients:
        raise RequestError(
            f"none of the transports {', '.join(config.transports)} is there: nothing to measure"
        )
    return found


def save(found: Djinn, ids: np.ndarray, layers: list[int]) -> None:
    """One run a client that keeps a checkpoint after each of *layers*. Raises LayerError."""
    for client in found.clients:
        client.points = client.model.run(ids, save_at=layers).checkpoints
        client.row = np.zeros(client.model.hidden_size, np.float32)


def exact(found: Djinn, plain_bits: bytes) -> tuple[int, int]:
    """(how many unedited resumes equal the plain model of this process bit for bit, of how many)."""
    equal = [
        point.resume().logits.tobytes() == plain_bits
        for client in found.clients
        for point in client.points.values()
    ]
    return sum(equal), len(equal)


def cases(found: Djinn, config: ResumeLatency) -> Found:
    chosen: Found = list(found.missing)
    for one in _variants(config, [client.transport for client in found.clients]):
        client = next(client for client in found.clients if client.transport == one.transport)
        on_gpu = client.model.device.startswith("cuda") and one.transport != "tcp"
        if one.edit == "row_in_place" and not on_gpu:
            why = "only a client on the machine of a GPU can write there"
            chosen.append(NotMeasured(f"{NAME}: {one}", why))
            continue
        try:
            chosen += [
                _case(found, client, point, layer, one) for layer, point in client.points.items()
            ]
        except RequestError as exc:  # no cupy, mostly
            chosen.append(NotMeasured(f"{NAME}: {one}", str(exc)))
    return chosen


class Variant(NamedTuple):
    """tier: None: wherever the engine keeps it. timed: what of an edit in place is."""

    transport: str
    end: str
    edit: str
    tier: str | None
    timed: str = ALONE

    def __str__(self) -> str:
        place = f", from {self.tier}" if self.tier else ""
        timed = f", {self.timed}" if self.edit in IN_PLACE else ""
        return f"{self.transport}, to {self.end}, edited {self.edit}{place}{timed}"


def _variants(config: ResumeLatency, transports: list[str]) -> Iterator[Variant]:
    axes: list[list[Any]] = [
        transports,
        list(config.ends),
        list(config.edits),
        [None, *config.tiers],
    ]
    base = [axis[0] for axis in axes]
    if config.every_combination:
        chosen = list(itertools.product(*axes))
    else:
        chosen = [tuple(base)]
        for place, axis in enumerate(axes):
            chosen += [(*base[:place], value, *base[place + 1 :]) for value in axis[1:]]
        if "logits" in config.ends:  # every way's whole as well, for who does not care for halves
            chosen += [(way, "logits", base[2], None) for way in transports]
    for one in dict.fromkeys(chosen):
        yield Variant(*one)
        if one[2] in IN_PLACE:
            yield Variant(*one, WITH_EDIT)
        if one[2] == "in_place":
            yield Variant(*one, AFTER_NUMPY)


def _case(found: Djinn, client: Client, point: Checkpoint, layer: int, one: Variant) -> Timed:
    options: dict[str, Any] = {}
    rewrite = finish = None
    if one.edit == "row":
        options["edits"] = [djinn.Add(client.row, at=(0, -1))]
    elif one.edit == "all":
        options["hidden"] = np.asarray(point.hidden)
    elif one.edit in IN_PLACE:
        known = layer, one.edit
        if known not in client.in_place:
            client.in_place[known] = _in_place(point, one.edit)
        there = client.in_place[known]
        options["hidden"], finish = there.view, there.finish
        rewrite = there.by_numpy if one.timed == AFTER_NUMPY else there.edit
    spans = found.spans.setdefault(str(one), [])
    on_clock = rewrite if one.timed == WITH_EDIT else None
    ready = one.end == "ready"
    task = resuming(point, client.model, spans, ready=ready, rewrite=on_clock, **options)
    steps = [task.before]
    if one.tier is not None:
        steps.append(_bringing(point, one.tier))
    if one.timed != WITH_EDIT:
        steps += [rewrite, finish]
    more = one._asdict() | {"tier": one.tier or point.tier}
    return Timed(NAME, str(one), layer, task.call, _in_turn(steps), task.clock, more=more)


def _in_turn(steps: list[Case | None]) -> Case | None:
    """All of them, one after the other."""
    there = [one for one in steps if one is not None]
    if len(there) < 2:
        return there[0] if there else None

    def go() -> None:
        for step in there:
            step()

    return go


def _in_place(point: Checkpoint, edit: str) -> InPlace:
    import torch

    if edit == "in_place":
        view, data = point.writable(), np.array(point.hidden)
        there, new = (torch.from_numpy(np.asarray(one).view(np.uint8)) for one in (view, data))
        return InPlace(view, rewriting(there, new), by_numpy=assigning(view, data))

    tensor = point.writable_cuda()

    def rewrite_row() -> None:
        tensor[0, -1] += 0  # a resume waits for it

    return InPlace(tensor, rewrite_row, torch.cuda.synchronize)


def _bringing(point: Checkpoint, tier: str) -> Case:
    """What brings *point* to *tier*."""

    def bring() -> None:
        if tier == "device":
            point.prefetch("device")
        else:
            point.evict(to=tier)
        if point.tier != tier:
            raise RuntimeError(f"asked for the {tier} tier, the checkpoint is in {point.tier}")

    return bring


def spans_table(found: Djinn, most: int) -> dict[str, list[dict[str, Any]]]:
    """Where each variant's time goes: the median of each span over the last *most* resumes."""
    made = {}
    for variant, spans in found.spans.items():
        last = spans[-most:]
        if not last:
            continue
        made[f"spans: {variant}"] = [
            {
                "span": name,
                "median_us": float(np.median([one[place][1] for one in last])) / 1e3,
                "n": len(last),
            }
            for place, (name, _) in enumerate(last[0])
        ]
    return made


if __name__ == "__main__":
    only(NAME)
