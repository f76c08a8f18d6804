"""The fast path's budgets: which results tell each of them, and how it stands.

A budget's target is where the figure is made: a ratio with a limit, or a check, of the benchmark that
measures it. Here stands only which of them it is. Beside some budgets stand figures that are none: what
is not to be hidden, or what the same costs otherwise.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from bench.writing import AFTER_NUMPY, ALONE, BEFORE, FIRST, WITH_EDIT
from djinn_zmq.probe import schema, tables
from djinn_zmq.probe.results import Check, NotMeasured, Results

SESSIONS = 64  # stopped at once
GAPS = {0: "back to back", 2: "2 ms idle", 50: "50 ms idle"}  # as `bench.noop` names them
NOTES = """\
--spin-us: server and engine stay awake so long after each message: off by default, and no budget is held by it
(target): no budget but a figure beside one, without a verdict; … is the case of the row above
over manual offload: a bare copy of a pinned tensor to the GPU, that nobody writes (untouched memory). "the resume
alone" is timed after the writing (idling lies between), by all of torch's threads where no other is named; "written
alike before the clock" is over an offload whose pinned tensor the same call has written in front of the clock,
"writing timed on both sides" over one that writes it on the clock
what threads of many cores wrote lies dirty in their L2 caches, and a copy over PCIe fetches it from there (read off
times: no counter was). 10.56 MB on an H200 machine of 16 cores, medians of 150: an offload takes 209 us untouched, 383
after 16 threads wrote, 236 after numpy's one; a resume alone 271, 547 and 320: 2.6 x untouched memory, 1.4 x memory
written alike, 1.5 x with numpy; and 1.3 x where nobody wrote"""


@dataclass(frozen=True, slots=True)
class Budget:
    """A line of the table. part: whose results tell it. pattern: matches the names of its ratios, or
    what its checks say; what differs between those (the layer) is a column. on_gpu: it is a figure of
    a GPU's, and without one there is no target. told: no budget but a figure beside one, without a
    verdict; the target that it is to be looked at with."""

    name: str
    part: str
    pattern: str
    on_gpu: bool = True
    told: str | None = None


def budgets(idle_ms: int) -> Iterator[Budget]:
    """Those of a resume, after so much idling."""
    part = f"resume-{idle_ms}"
    offload = " / manual offload$"
    ready = "djinn: lane, to ready, edited"
    yield Budget("ready, unedited, on the GPU", part, f"{ready} none, from device, .*{offload}")
    yield Budget("… the same at every layer", part, f"{ready} none, from device takes the same")
    # What is timed of an edit in place, and why: bench/writing.py.
    row, every = f"{ready} row_in_place", f"{ready} in_place"
    yield Budget(
        "ready, a row edited in place, the edit timed", part, f"{row}, {WITH_EDIT}, .*{offload}"
    )
    yield Budget("… the resume alone", part, f"{row}, {ALONE}, .*{offload}", told="<= 1")
    alone, edited = f"{every}, {ALONE}, .*", f"{every}, {WITH_EDIT}, .*"
    yield Budget(
        "ready, all rewritten in place, the resume alone, over untouched memory",
        part,
        f"{alone}{offload}",
    )
    yield Budget(
        "… over memory written alike before the clock", part, f"{alone} / manual offload, {BEFORE}$"
    )
    yield Budget(
        "… written by one thread (numpy), over untouched memory",
        part,
        f"{every}, {AFTER_NUMPY}, .*{offload}",
    )
    yield Budget("… writing timed on both sides", part, f"{edited} / manual offload, {FIRST}$")
    yield Budget("… writing timed on this side only", part, f"{edited}{offload}", told="<= 1.6")
    yield Budget("ready, evicted to host memory", part, f"{ready} none, from host, .*{offload}")
    yield Budget("ready, plain ipc", part, "djinn: ipc, to ready, edited none, .*round trip and",
                 on_gpu=False)  # fmt: skip
    if idle_ms == 0:
        logits = "djinn: lane, to logits, edited none, layer .* / the model's own layers"
        yield Budget("to the logits", part, logits)
        for kept in ("one", "every"):
            for other in ("one that saves nothing", "the plain model's forward"):
                yield Budget(
                    f"run that saves after {kept} layer, over {other}",
                    part,
                    f"run, saving after {kept} layer / {other}",
                )


def awake(idle_ms: int, spin_us: int) -> Iterator[Budget]:
    """What the same comes to where server and engine stay awake over the idling: off by default, and no
    budget."""
    spin = f"--spin-us {spin_us}"
    ready = "djinn: lane, to ready, edited none, from device, .* / manual offload$"
    yield Budget(
        f"ready, unedited, on the GPU, with {spin}", f"spin-resume-{idle_ms}", ready, told="<= 0.5"
    )
    gap = GAPS[idle_ms]
    for way, below, limit in (
        ("by lane", "bare doorbell", "2"),
        ("over tcp", "bare ROUTER", "1.4"),
    ):
        either = f"^{way.split()[1]}, {gap}(, {spin})?: "
        name = f"no-op {way}, {gap}: without, with {spin}"
        yield Budget(name, "spin-noop", f"{either}djinn / {below}$", False, told=f"<= {limit}")
        yield Budget(
            "… cores that server and engine keep busy",
            "spin-noop",
            f"{either}cores",
            False,
            told="",
        )


def rest() -> Iterator[Budget]:
    for gap in GAPS.values():
        yield Budget(f"no-op by lane, {gap}", "noop", f"lane, {gap}: djinn", on_gpu=False)
        yield Budget(f"no-op over ipc, {gap}", "noop", f"ipc, {gap}: djinn", on_gpu=False)
        yield Budget(f"no-op over tcp, {gap}", "noop", f"tcp, {gap}: djinn / bare ROUTER$", False)
    for way in ("ipc", "tcp"):
        yield Budget(
            f"requests a second, 64 clients, {way}", "noop", f"64 clients, {way}: djinn", False
        )
    yield Budget("activation over tcp", "upload", "tcp: frames / ", on_gpu=False)
    yield Budget("client import", "import", "importing the client takes at most", on_gpu=False)
    yield Budget("client import, no torch", "import", "imports no torch", on_gpu=False)
    for way in ("out", "in", "both at once"):
        yield Budget(f"swap rate, {way}", "swap", f"swap {way} /")
    for name, pattern in (
        ("resumed", "sessions resumed$"),
        ("tokens", "token accuracy"),
        ("logits", "logits equal"),
        ("others served", "second client"),
        ("evicted", "from a slower tier"),
        ("freed", "nothing is kept"),
    ):
        yield Budget(f"{SESSIONS} stopped sessions: {name}", "memory", pattern, on_gpu=False)
    yield Budget(f"{SESSIONS} stopped sessions: plateau", "memory", "GPU memory at most")


@dataclass(slots=True)
class Line:
    """A budget as it stands. verdict: None: not measured here."""

    budget: Budget
    target: str = ""
    ratios: list[schema.Ratio] = field(default_factory=list)
    check: schema.Check | None = None
    why: str = ""

    @property
    def verdict(self) -> str:
        if self.budget.told is not None:
            there = self.ratios or (self.check is not None and self.check.held is not None)
            return "-" if there else "not measured"
        if self.check is not None:
            held = self.check.held
            return "not measured" if held is None else "held" if held else "missed"
        verdicts = [one.held for one in self.ratios]
        if not verdicts:
            return "not measured"
        if any(one is None for one in verdicts):
            return "no target here"
        return "held" if all(verdicts) else "missed"

    @property
    def cells(self) -> list[str]:
        if self.check is not None:
            return [self.budget.name, self.target, "", "", self.verdict]
        counts = sorted({n for one in self.ratios for n in one.n})
        n = "/".join(map(str, counts))
        values = " ".join(f"{one.value:.3g}" for one in self.ratios)
        return [self.budget.name, self.target, values, n, self.verdict]


def line_of(budget: Budget, found: schema.File | None, why: str) -> Line:
    if found is None:
        return Line(budget, why=why)
    ratios = [one for one in found.ratios if re.search(budget.pattern, one.name)]
    limits = {(one.limit, one.at_least) for one in ratios if one.limit is not None}
    target = ", ".join(
        f"{'>=' if at_least else '<='} {limit:g}" for limit, at_least in sorted(limits)
    )
    if budget.told:
        target = f"({budget.told})"
    if ratios:
        return Line(budget, target, ratios)
    for check in found.checks:
        if re.search(budget.pattern, check.what):
            return Line(budget, check=check, why=check.found)
    if budget.on_gpu and not found.machine.gpus:
        return Line(budget, why="there is no GPU")
    words = budget.pattern.replace(".*", "").split(" / ")[0].split(", layer")[0]
    reasons = [one.why for one in found.not_measured if words.rstrip(", ") in one.what]
    return Line(budget, why=reasons[0] if reasons else f"{budget.part} does not have it")


# ---- all of them


def into(results: Results, lines: list[Line]) -> None:
    """*lines*, as rows of results; what has no figure goes to what was not measured."""
    rows, results.not_measured = [], []
    for line in lines:
        where = f"{line.budget.part}: {line.budget.name}"
        if line.verdict == "not measured":
            results.not_measured.append(NotMeasured(where, line.why))
        for one in line.ratios:
            layer = re.search(r", layer (\d+)", one.name)
            rows.append({
                "budget": line.budget.name, "part": line.budget.part, "ratio_of": one.name,
                "layer": int(layer[1]) if layer else None, "target": line.target,
                "ratio": one.value, "low": one.low, "high": one.high, "n": list(one.n),
                "held": None if line.budget.told is not None else one.held,
            })  # fmt: skip
    results.tables["budgets"] = rows
    results.checks = [
        Check(f"{one.budget.part}: {one.budget.name}", _held(one), one.why or one.cells[2])
        for one in lines
        if one.verdict in ("held", "missed")
    ]


def _held(line: Line) -> bool:
    return line.verdict == "held"


def table_of(lines: list[Line], layers: tuple[int, ...]) -> str:
    shown: list[list[str]] = []
    for line in lines:
        idle = re.search(r"resume-([1-9]\d*)$", line.budget.part)
        name, *cells = line.cells
        found = cells[1] or line.why
        shown.append([f"{name}{f', idle {idle[1]} ms' if idle else ''}", cells[0],
                      cells[2], cells[3], found])  # fmt: skip
    at = ", ".join(map(str, layers))
    columns = ["budget", "target", "n", "verdict", f"ratio (at layers {at}), or what was found"]
    wide = tables.aligned(columns[:4], [row[:4] for row in shown]).splitlines()
    last = [columns[4], *(row[4] for row in shown)]
    rows = (f"{one}   {two}".rstrip() for one, two in zip(wide, last, strict=True))
    return "\n".join([*rows, "", NOTES])
