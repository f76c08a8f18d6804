"""What the memory-pressure experiment found, against what its file asks for."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from djinn_zmq.probe import tables
from djinn_zmq.probe.results import Check, Results
from djinn_zmq.settings import format_bytes

if TYPE_CHECKING:
    from bench.pressure import Came, Pressure


def checks(pressure: "Pressure", came: Sequence["Came"]) -> list[Check]:
    """One for each key of the validation block. held None: it could not be measured here."""
    asked = {k: v for k, v in asdict(pressure.asked.validation).items() if v is not None}
    return [_CHECKS[key](pressure, came, wanted) for key, wanted in asked.items()]


def _sessions(pressure: "Pressure", came: Sequence["Came"], wanted: int) -> Check:
    return Check(f"at least {wanted} sessions resumed", len(came) >= wanted, f"{len(came)}")


def _token_accuracy(pressure: "Pressure", came: Sequence["Came"], wanted: float) -> Check:
    right = total = 0
    for one in came:
        expected = pressure.expected[one.number][0]
        right += sum(a == b for a, b in zip(one.tokens, expected, strict=False))
        total += max(len(expected), len(one.tokens))
    share = right / total
    return Check(
        f"token accuracy at least {wanted:.0%}", share >= wanted, f"{right} of {total}, {share:.2%}"
    )


def _bit_exact(pressure: "Pressure", came: Sequence["Came"], wanted: bool) -> Check:
    what = "logits equal the plain model's as bits"
    equal = sum(one.logits == pressure.expected[one.number][1] for one in came)
    return Check(what, (equal == len(came)) is wanted, f"{equal} of {len(came)}")


def _steering(pressure: "Pressure", came: Sequence["Came"], wanted: bool) -> Check:
    """The steered one differs from the same prompt unsteered; that all others are right, and it
    itself equals the plain model with the same vector, the other checks say."""
    number = pressure.asked.steer
    one = next(one for one in came if one.number == number)
    changed = one.logits != pressure.unsteered[1]
    return Check("the steered session, and it alone, comes out otherwise", changed is wanted,
                 f"session {number}: {'other' if changed else 'the same'} output")  # fmt: skip


def _others(pressure: "Pressure", came: Sequence["Came"], wanted: bool) -> Check:
    wrong = pressure.wrong_answers
    found = f"{pressure.others - len(wrong)} of {pressure.others} right" + "".join(
        f"; {one}" for one in wrong[:2]
    )
    return Check("a second client is served in between", (not wrong) is wanted, found)


def _device_limit(pressure: "Pressure", came: Sequence["Came"], wanted: float) -> Check:
    what = f"device tier at most {wanted:g} of its budget"
    rows = [row for row in pressure.timeline if row.get("device_limit")]
    if not rows:
        return Check(what, None, "no device tier is reported")
    peak = max(row["device"] for row in rows)
    limit = rows[0]["device_limit"]
    return Check(what, peak <= wanted * limit, f"{format_bytes(peak)} of {format_bytes(limit)}")


def _plateau(pressure: "Pressure", came: Sequence["Came"], wanted: float) -> Check:
    what = f"GPU memory at most {wanted:g} of what it was with half of the sessions stopped"
    rows = [row for row in pressure.timeline if row["gpu"] is not None]
    if not rows:
        return Check(what, None, "there is no GPU")
    half = next(row["gpu"] for row in rows if row["stopped"] >= pressure.asked.sessions // 2)
    peak = max(row["gpu"] for row in rows)
    return Check(what, peak <= wanted * half, f"{format_bytes(peak)} after {format_bytes(half)}")


def _evictions(pressure: "Pressure", came: Sequence["Came"], wanted: int) -> Check:
    what = f"at least {wanted} sessions resumed from a slower tier"
    if not any(row.get("device_limit") for row in pressure.timeline):
        return Check(what, None, "there is no device tier")
    count = sum(one.tier != "device" for one in came)
    return Check(what, count >= wanted, f"{count} of {len(came)}")


def _freed(pressure: "Pressure", came: Sequence["Came"], wanted: bool) -> Check:
    """Beyond what was there before the first stop."""
    begin, last = pressure.timeline[0], pressure.timeline[-1]
    what = "nothing is kept once all is released"
    nbytes, before = (
        sum(row.get(name) or 0 for name in ("host", "device", "disk", "kv"))
        for row in (last, begin)
    )
    kept = last["checkpoints"] - begin["checkpoints"]
    empty = kept <= 0 and nbytes <= before
    return Check(what, empty is wanted, f"{kept} kept, {format_bytes(max(0, nbytes - before))}")


_CHECKS: dict[str, Any] = {
    "sessions": _sessions,
    "token_accuracy": _token_accuracy,
    "bit_exact": _bit_exact,
    "steering_contained": _steering,
    "others_right": _others,
    "device_memory_limit": _device_limit,
    "plateau": _plateau,
    "evictions": _evictions,
    "everything_freed": _freed,
}


def show(results: Results) -> None:
    click.echo("\n" + tables.of_samples("latency", results.samples, "ms") + "\n")
    rows = results.tables["timeline"]
    for name in ("gpu", "device", "host", "disk", "kv", "kv_host", "engine_resident"):
        values = [row[name] for row in rows if row.get(name) is not None]
        if values:
            click.echo(
                f"{name:<16} {format_bytes(values[0]):>10} at the start, "
                f"{format_bytes(max(values)):>10} at most, {format_bytes(values[-1]):>10} at the end "
                f"(n = {len(values)})"
            )
    click.echo()
    for line in (*results.checks, *results.not_measured):
        click.echo(str(line))
