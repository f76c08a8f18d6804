"""`djinn ps`: what a server holds."""

import time
from collections.abc import Sequence
from pathlib import Path

import click
import msgspec

from djinn_zmq.cli import endpoint as on_endpoint
from djinn_zmq.cli import naming
from djinn_zmq.client.server import connect
from djinn_zmq.settings import counted, format_bytes
from djinn_zmq.wire.messages import StatusReply

ASKED_BY = {"device": "--gpu-memory", "host": "--host-memory", "disk": "--state"}


@click.command()
@on_endpoint.options
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def ps(endpoint: str | None, key: Path | None, as_json: bool) -> None:
    """Show a server's models, engines, sessions, checkpoints and memory."""
    with connect(endpoint, key=key) as server:
        begin = time.perf_counter()
        status = server.status()
        elapsed_s = time.perf_counter() - begin
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(_named(status))).decode())
    else:
        click.echo(report(status, elapsed_s))


def _named(value: object) -> object:
    """Structs as objects with field names: on the wire they are arrays."""
    if isinstance(value, msgspec.Struct):
        return {name: _named(getattr(value, name)) for name in value.__struct_fields__}
    if isinstance(value, tuple):
        return [_named(item) for item in value]
    return value


def report(status: StatusReply, elapsed_s: float) -> str:
    memory = status.memory
    parts = [
        (
            f"djinn {status.version}, pid {status.pid}, up {_duration(status.uptime_s)}, "
            f"at {' and '.join(status.endpoints)}; answered in {elapsed_s * 1e3:.1f} ms"
        ),
        f"can serve by name: {', '.join(status.names)}",
        _table(
            ("ENGINE", "DEVICE", "STATE", "PID", "RESTARTS", "RESIDENT", "DOING"),
            [
                (
                    str(one.index),
                    one.device,
                    one.state,
                    str(one.pid),
                    str(one.restarts),
                    format_bytes(one.resident),
                    one.detail,
                )
                for one in status.engines
            ],
        ),
        _table(
            ("MODEL", "ARCHITECTURE", "LAYERS", "HIDDEN", "PARAMETERS", "WEIGHTS", "DTYPE", "ON"),
            [
                (
                    one.name,
                    one.architecture,
                    str(one.num_layers),
                    str(one.hidden_size),
                    f"{one.num_parameters / 1e6:.2f} M",
                    format_bytes(one.nbytes),
                    one.dtype,
                    one.device,
                )
                for one in status.models
            ],
        ),
        _table(
            (
                *(
                    "SESSION",
                    "OWNER",
                    "MODEL",
                    "STATE",
                    "CHECKPOINTS",
                    "SIZE",
                    "KV",
                    "WAITING",
                    "AGE",
                ),
                *("PID", "PROGRAM"),
            ),
            [
                (
                    f"{one.id:016x}{' *' if one.yours else ''}",
                    one.owner,
                    one.model,
                    one.state,
                    str(one.checkpoints),
                    format_bytes(one.nbytes),
                    format_bytes(one.kv),
                    str(one.waiting),
                    _duration(one.age_s),
                    str(one.pid or "-"),
                    naming.shown(one.program),
                )
                for one in status.sessions
            ],
        ),
        _table(("TIER", "ENGINE", "CHECKPOINTS", "USED", "LIMIT", "FULL"), _tiers(status)),
        (
            f"memory: {counted(memory.checkpoints, 'checkpoint')}, each counted in every tier that has a copy; "
            f"{format_bytes(memory.arenas)} of shared memory mapped so far"
        ),
    ]
    return "\n\n".join(parts)


def _tiers(status: StatusReply) -> list[tuple[str, ...]]:
    """What each engine keeps where, the fastest tier first, and the keys and values of its sessions."""
    rows = []
    for engine in status.engines:
        for one in status.memory.tiers:
            if one.engine != engine.index:
                continue
            limit, full = format_bytes(one.limit), f"{one.used / (one.limit or 1):.0%}"
            if not one.limit:
                limit, full = f"none without {ASKED_BY[one.name]}", ""
            used = format_bytes(one.used)
            rows.append((one.name, str(one.engine), str(one.checkpoints), used, limit, full))
        kv = sum(one.kv for one in status.sessions if one.engine == engine.index)
        if kv:
            rows.append(("KV", str(engine.index), "-", format_bytes(kv), "", ""))
    memory = status.memory
    if memory.unclaimed:
        nbytes = format_bytes(memory.unclaimed_nbytes)
        rows.append(("unclaimed", "-", str(memory.unclaimed), nbytes, "", ""))
    return rows


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return f"no {head[0].lower()}s"
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (head, *rows)
    )


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
