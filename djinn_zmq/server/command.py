"""The command that serves. `djinn serve` and `python -m djinn_zmq.server` are both this one."""

import contextlib
import ipaddress
import logging
import os
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from djinn_zmq.bus.keys import server_keys
from djinn_zmq.errors import DjinnError, RequestError
from djinn_zmq.memory import shared
from djinn_zmq.server.catalog import shape_names
from djinn_zmq.server.descriptors import allow_many_descriptors
from djinn_zmq.server.malloc import keep_freed_memory
from djinn_zmq.server.server import Server
from djinn_zmq.settings import (
    LONGEST,
    MIB,
    Settings,
    format_bytes,
    private_dir,
    socket_path,
)

LEAST_HOST_MEMORY = 256 * MIB  # whatever is free: a server that keeps nothing is of no use


def _default(name: str) -> Any:
    return Settings.__dataclass_fields__[name].default


def _devices(gpus: tuple[int, ...], device: str | None) -> list[str]:
    """Where engines run: one for each GPU asked for, else the CPU."""
    if device == "cpu" or not gpus:
        return ["cpu"]
    if not Path("/proc/driver/nvidia/version").exists():
        names = ", ".join(f"--gpu {gpu}" for gpu in gpus)
        click.echo(f"djinn: no NVIDIA GPU on this machine ({names}): serving on the CPU", err=True)
        return ["cpu"]
    return [f"cuda:{gpu}" for gpu in dict.fromkeys(gpus)]


def _ipc(path: Path | None) -> Path:
    """Where the ipc socket goes. Clients are told this path, so it must not depend on where the
    server was started; and libzmq would remove whatever else stands there without a word."""
    chosen = socket_path(os.path.abspath(path) if path is not None else None)
    if not chosen.parent.is_dir():
        raise RequestError(
            f"--ipc {path}: there is no directory {chosen.parent}: make it (mode 0700)"
        )
    for suffix in ("", ".lease", ".news"):
        path = chosen.with_name(chosen.name + suffix)
        if os.path.lexists(path) and not path.is_socket():
            raise RequestError(f"{path} exists and is no socket: choose another path with --ipc")
    lock = chosen.with_name(f"{chosen.name}.lock")  # empty, and removed at the end
    if os.path.lexists(lock) and (not lock.is_file() or lock.stat().st_size):
        raise RequestError(f"{lock} exists and is no server's: choose another path with --ipc")
    return chosen


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _tcp(host: str, port: int, keys: Path | None) -> str | None:
    if port == 0:
        return None
    if not _is_loopback(host) and keys is None:
        raise RequestError(
            f"--host {host} can be reached from other machines: give --keys DIR with the keys of "
            "the clients that may connect ('djinn keys --help')"
        )
    address = "127.0.0.1" if host == "localhost" else host
    return f"tcp://[{address}]:{port}" if ":" in address else f"tcp://{address}:{port}"


def _events_port(asked: int, port: int) -> int:
    """Raises RequestError for one that is taken by this command itself, or that nothing is at."""
    if asked and not port:
        raise RequestError(f"--events-port {asked} without TCP: give --port, too")
    if asked and asked == port:
        raise RequestError(
            f"--events-port {asked} is --port: choose another, or any that is free, 0"
        )
    return asked


def _host_memory(asked: int | None, engines: int) -> int:
    """Bytes for each engine: as asked (MiB), or half of what is free, shared by them."""
    if asked is not None:
        return _at_most(shared.installed(), "--host-memory", asked, engines, "this machine")
    return max(LEAST_HOST_MEMORY, shared.available() // 2 // engines)


def _device_memory(asked: int | None, devices: list[str]) -> int | None:
    """Bytes for each engine as asked (MiB); None: each finds out what its device has."""
    if asked is None:
        return None
    if devices == ["cpu"]:
        return _at_most(shared.installed(), "--gpu-memory", asked, 1, "this machine")
    return asked * MIB


def _at_most(there_is: int, option: str, asked: int, engines: int, whose: str) -> int:
    """*asked* MiB in bytes. Raises RequestError where *engines* of them can never be had."""
    if asked * MIB * engines > there_is:
        times = f" for each of {engines} engines" if engines > 1 else ""
        raise RequestError(
            f"{option} {asked} (MiB){times} is more than {whose} has: {format_bytes(there_is)}"
        )
    return asked * MIB


def _disk(state: Path | None, asked: int | None, engines: int) -> int:
    """Bytes for each engine in *state*. Raises RequestError for a size without a place."""
    if state is None:
        if asked is not None:
            raise RequestError("--disk says how much: give --state DIR, too, which says where")
        return 0
    usage = shutil.disk_usage(state)
    if asked is not None:
        return _at_most(usage.total, "--disk", asked, engines, f"the file system of {state}")
    return usage.free // 2 // engines


def _stop_at_end_of_stdin(stop: Callable[[], None]) -> None:
    """Have *stop* called when the other end of standard input is closed, by whatever ended it."""

    def wait() -> None:
        while os.read(0, 4096):
            pass
        with contextlib.suppress(OSError):  # it has stopped meanwhile
            stop()

    threading.Thread(target=wait, name="end-of-stdin", daemon=True).start()


@click.command()
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=5556,
    show_default=True,
    help="TCP port; 0: no TCP at all.",
)
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address to bind the TCP port on. Any but the loopback needs --keys.",
)
@click.option(
    "--gpu",
    "gpus",
    type=click.IntRange(min=0),
    multiple=True,
    help="GPU to serve on, by index; repeatable, one engine each. Without a GPU: the CPU.",
)
@click.option("--device", type=click.Choice(["cpu"]), help="Serve on the CPU, whatever --gpu says.")
@click.option(
    "--model",
    "models",
    multiple=True,
    metavar="NAME|DIR|HUB_ID",
    help="Load this model at the start; repeatable. Others load when a client asks for them.",
)
@click.option(
    "--random-weights",
    "shapes",
    multiple=True,
    metavar="SHAPE",
    help=f"Serve a model of this shape with random weights ({', '.join(shape_names())}); repeatable.",
)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="Type of the weights; auto: as they are stored.",
)
@click.option(
    "--ipc",
    type=click.Path(path_type=Path),
    help="Path of the ipc socket. [default: djinn.sock in your runtime directory]",
)
@click.option(
    "--keys",
    type=click.Path(path_type=Path, file_okay=False),
    help="Directory with server.key and allowed/*.pub; TCP clients then need an allowed key.",
)
@click.option(
    "--gpu-memory",
    type=click.IntRange(min=0),
    help="Device memory for checkpoints, in MiB, for each engine. [default: a quarter of what is free "
    "on a GPU; on the CPU none, because it reads host memory as it is]",
)
@click.option(
    "--host-memory",
    type=click.IntRange(min=1),
    help="Shared memory for checkpoints and large logits, in MiB, for each engine. [default: half of what "
    "is free]",
)
@click.option(
    "--state",
    type=click.Path(path_type=Path, file_okay=False),
    help="Directory for checkpoints that no memory has room for, and for those that open sessions have at "
    "a stop: they outlive the server. "
    "[default: none, there is no disk tier]",
)
@click.option(
    "--disk",
    type=click.IntRange(min=1),
    help="Room in --state, in MiB, for each engine. [default: half of what is free there]",
)
@click.option(
    "--stop-s",
    type=click.FloatRange(0, LONGEST["stop_s"], min_open=True),
    default=_default("stop_s"),
    show_default=True,
    help="Seconds for which a stop may write checkpoints to --state that are not there yet; a second "
    "Ctrl-C ends that.",
)
@click.option(
    "--grace-s",
    type=click.FloatRange(0, LONGEST["grace_s"], min_open=True),
    default=_default("grace_s"),
    show_default=True,
    help="Seconds for which the sessions of a client with a key outlive its connection.",
)
@click.option(
    "--threads",
    type=click.IntRange(1, 1024),
    help="Threads of a CPU engine. [default: torch's choice]",
)
@click.option(
    "--spin-us",
    type=click.IntRange(0, LONGEST["spin_us"]),
    default=_default("spin_us"),
    show_default=True,
    help="Microseconds for which server and engines stay awake after a message; costs that much of "
    "a core each, and saves a wake-up.",
)
@click.option(
    "--events-port",
    type=click.IntRange(0, 65535),
    default=0,
    help="TCP port that events are published at, beside --port. [default: any that is free]",
)
@click.option("--private", is_flag=True, hidden=True, help="Stop when standard input ends.")
@click.option("-v", "--verbose", is_flag=True, help="Log more.")
def serve(
    port: int,
    host: str,
    gpus: tuple[int, ...],
    device: str | None,
    models: tuple[str, ...],
    shapes: tuple[str, ...],
    dtype: str,
    ipc: Path | None,
    keys: Path | None,
    gpu_memory: int | None,
    host_memory: int | None,
    state: Path | None,
    disk: int | None,
    stop_s: float,
    grace_s: float,
    threads: int | None,
    spin_us: int,
    events_port: int,
    private: bool,
    verbose: bool,
) -> None:
    """Serve models: hold weights, sessions and checkpoints, and answer clients.

    Answers within a second; models load in the background. Stop it with Ctrl-C or `djinn stop`.

    \b
      python -m djinn_zmq.server --port 5556 --gpu 0
      djinn serve --model tiny --port 0
      djinn serve --host 0.0.0.0 --keys ~/.cache/djinn/keys --model smollm2
    """
    keep_freed_memory()
    allow_many_descriptors()
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.INFO,
        format="%(asctime)s %(name)s %(message)s",
        stream=sys.stderr,
    )
    try:
        devices = _devices(gpus, device)
        settings = Settings(
            host_memory=_host_memory(host_memory, len(devices)),
            device_memory=_device_memory(gpu_memory, devices),
            state=None if state is None else str(private_dir(state.absolute())),
            disk=_disk(state, disk, len(devices)),
            threads=threads,
            stop_s=stop_s,
            grace_s=grace_s,
            spin_us=spin_us,
        )
        server = Server(
            _ipc(ipc),
            settings,
            devices=devices,
            dtype=dtype,
            models=models,
            shapes=shapes,
            tcp=_tcp(host, port, keys),
            keys=server_keys(keys) if keys is not None else None,
            events_port=_events_port(events_port, port),
        )
    except DjinnError as exc:
        raise click.ClickException(str(exc)) from exc
    server.stop_on_signals()
    if private:
        _stop_at_end_of_stdin(server.stop)
    click.echo(f"djinn: serving at {' and '.join(server.endpoints())}", err=True)
    try:
        server.serve()
    except DjinnError as exc:
        raise click.ClickException(str(exc)) from exc
    finally:
        server.close()
        if private:  # whoever would remove it may be gone
            with contextlib.suppress(OSError):
                server.path.parent.rmdir()
    click.echo("djinn: stopped", err=True)
