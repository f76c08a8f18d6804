"""The ladder: what each floor of software adds to one resume, measured from the socket up.

    raw socket     the same bytes and an acknowledgement, blocking calls      (what the kernel costs)
    ZeroMQ         DEALER to ROUTER, another process                          (+ its threads)
    codec          … with Djinn's messages made and read at both ends         (+ our format)
    server         a no-op to Djinn's server                                  (+ its loop)
    engine         a no-op through the server to the engine                   (+ the link, the loop)
    lane           the same no-op by the lane, where this client has one      (what that saves)
    between        the no-op once more, each behind a resume           (its way is warm no more)
    answer         the resume's own answer made, and the server told of what it keeps; and a no-op's
    doorbell       the bare one, answered after as long as the engine takes; and at once
    resume         the whole, as a user waits for it

A step is the difference of two neighbouring medians; all rungs take turns in one run. What a resume
adds to a no-op is not a difference of wholes but what is measured where it is spent:

    client         all that this process does itself, for a resume and for a no-op, by its own clock
    answer         the very messages that the engine makes behind its last span, made here, beyond a
                   no-op's; where there is no lane, the server's reading of its notice too
    taken in       what the engine has a no-op for until it makes its answer, as the no-op's reply says:
                   the spans tell of a resume's own, so it counts once
    wake-up        who is woken after a longer sleep wakes later
    the others     the spans in the resume's own reply, measured inside the engine

So the steps need not add up to the whole, and that they do is a finding.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from djinn_zmq.probe import tables
from djinn_zmq.probe.samples import Samples
from djinn_zmq.spans import Spans

RAW, ZMQ, CODEC, SERVER, ENGINE, LANE, BETWEEN, ANSWER, PONG, LATE, BELL, RESUME = (
    "raw socket",
    "ZeroMQ",
    "codec",
    "server, no-op",
    "engine, no-op",
    "engine, no-op, lane",
    "no-op between resumes",
    "answer, resume's",
    "answer, no-op's",
    "doorbell, late",
    "doorbell",
    "resume",
)
BARE = (RAW, ZMQ, CODEC)
NO_OPS = (RAW, ZMQ, CODEC, SERVER, ENGINE, LANE, BETWEEN)  # each above the one before it
ADDS_UP = 0.1  # of the whole: how much of it may be unexplained

ABOUT = {
    RAW: "the kernel's sockets and two wake-ups",
    ZMQ: "ZeroMQ's threads",
    CODEC: "our messages made and read",
    SERVER: "the server's loop",
    ENGINE: "the link and the engine's loop",
    LANE: "shared memory in place of sockets",
    BETWEEN: "the no-op's way is not warm where something else went before",
    "client": "asking and taking in, beyond a no-op's",
    "messages": "in the engine, checked and put together",
    "queue": "in the engine, between turns",
    "restore": "the checkpoint out of its slot",
    "record": "the layers' arguments",
    "edit": "the edits made",
    "compute": "layers and head",
    "copy": "what is kept, into its slot",
    "taken in": "a no-op's, which the spans tell of as well",
    "answer": "made, and the server told, beyond a no-op's",
    "wake-up": "who is woken after a longer sleep wakes later",
}


@dataclass(frozen=True, slots=True)
class Step:
    """seconds may be negative: a rung that is cheaper than the one below it. n: samples behind."""

    name: str
    seconds: float
    n: int


@dataclass(frozen=True, slots=True)
class Decomposition:
    """whole: of the resume, by the client's clock."""

    steps: tuple[Step, ...]
    whole: Samples
    nbytes: int

    @property
    def sum_s(self) -> float:
        return sum(step.seconds for step in self.steps)

    @property
    def rest_s(self) -> float:
        return self.whole.median_s - self.sum_s

    @property
    def explained(self) -> float:
        """Of the whole: 1.0 where the steps add up to it."""
        return self.sum_s / self.whole.median_s

    @property
    def adds_up(self) -> bool:
        return abs(1 - self.explained) <= ADDS_UP

    def rows(self) -> list[dict[str, Any]]:
        """For results: a step a row, the rest and the whole at the end."""
        total = self.whole.median_s
        named = [(step.name, step.seconds, step.n) for step in self.steps]
        named += [("rest", self.rest_s, self.whole.n), ("whole", total, self.whole.n)]
        return [
            {
                "step": name,
                "seconds": seconds,
                "share": seconds / total,
                "about": ABOUT.get(name, ""),
                "n": n,
            }
            for name, seconds, n in named
        ]

    def __str__(self) -> str:
        sign = {step.name: "+ " for step in self.steps[1:]}
        rows = [
            [
                sign.get(str(row["step"]), "") + str(row["step"]),
                _signed(float(row["seconds"]) * 1e6),
                f"{row['share']:.1%}",
                str(row["n"]),
                str(row["about"]),
            ]
            for row in self.rows()
        ]
        columns = [f"{self.nbytes:,} bytes up", "us", "share", "n"]
        lines = tables.aligned(columns, [row[:4] for row in rows]).splitlines()
        abouts = ["", *(row[4] for row in rows)]
        table = "\n".join(
            f"{one}  {about}".rstrip() for one, about in zip(lines, abouts, strict=True)
        )
        verdict = "add up to it" if self.adds_up else "DO NOT ADD UP to it"
        return (
            f"{table}\n\nthe steps explain {self.explained:.1%} of the whole: they {verdict} "
            f"(within {ADDS_UP:.0%})"
        )


def _signed(value: float) -> str:
    return ("-" if value < 0 else "") + tables.number(abs(value))


def decompose(
    taken: Mapping[str, Samples],
    spans: Sequence[Spans],
    own_s: Mapping[str, Sequence[float]],
    inside_s: Sequence[float],
    nbytes: int = 0,
) -> Decomposition:
    """Steps from what each rung took, and from the spans of the resumes.

    own_s: by rung, what this process spent itself in each call; of a resume, and of the no-op below
    it. inside_s: what the engine had that no-op for. nbytes: that every rung carried up.
    """
    steps = []
    below = 0.0
    there = [rung for rung in NO_OPS if rung in taken]
    for rung in there:
        steps.append(Step(rung, taken[rung].median_s - below, taken[rung].n))
        below = taken[rung].median_s
    whole = taken[RESUME]
    client = float(np.median(own_s[RESUME])) - float(np.median(own_s[there[-1]]))
    steps.append(Step("client", client, len(own_s[RESUME])))
    steps += [Step(name, seconds, len(spans)) for name, seconds in _medians(spans).items()]
    inside = -float(np.median(inside_s))
    steps.append(Step("taken in", inside, len(inside_s)))
    for name, more, less in (("answer", ANSWER, PONG), ("wake-up", LATE, BELL)):
        beyond_s = taken[more].median_s - taken[less].median_s
        steps.append(Step(name, beyond_s, taken[more].n))
    return Decomposition(tuple(steps), whole, nbytes)


def _medians(spans: Sequence[Spans]) -> dict[str, float]:
    """The engine's spans by name, in seconds; what it makes and reads of messages together.

    A run's spans are: the client's encode, the wire, the engine's own, the client's decode.
    """
    inside: dict[str, list[float]] = {}
    for one in spans:
        by_name: dict[str, int] = {}
        for name, elapsed_ns in one[2:-1]:
            name = "messages" if name in ("encode", "decode") else name
            by_name[name] = by_name.get(name, 0) + elapsed_ns
        for name, elapsed_ns in by_name.items():
            inside.setdefault(name, []).append(elapsed_ns / 1e9)
    return {name: float(np.median(values)) for name, values in inside.items()}
