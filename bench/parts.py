"""Parts of a larger measurement, each a command in a process of its own.

A part that fails, or runs out of its time, is named with the reason; the others go on.
"""

import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path

from djinn_zmq.probe.results import Check

ROOT = Path(__file__).parent.parent
END_S = 20.0  # after Ctrl-C a part writes down what it has, within this
LEAST_S = 5.0  # a part with less than this is not begun


@dataclass(frozen=True, slots=True)
class Part:
    """`python -m MODULE OPTIONS`, whose exit status has to be 0. most_s: seconds it may take at most.
    cannot: why it is not begun on this machine; empty: it can be."""

    name: str
    module: str
    options: tuple[str, ...]
    most_s: float
    cannot: str = ""


def run(part: Part, seconds: float, log: Path) -> Check:
    """Within *seconds*, and no longer than it may take. At the end of its time it gets a Ctrl-C, so
    that it writes what it has."""
    if part.cannot:
        return Check(part.name, None, part.cannot)
    begin = time.monotonic()
    limit = min(part.most_s, seconds)
    if limit < LEAST_S:
        return Check(part.name, None, "no time was left for it")
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # A shell's background job ignores Ctrl-C, and its children would inherit that.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", part.module, *part.options],
            cwd=ROOT, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            status = process.wait(limit)
            why = "" if status == 0 else f"status {status}: {_last_line(log)}"
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            status, why = 1, f"its {limit:.0f} s were over; {_last_line(log)}"
        except BaseException:
            process.terminate()
            process.wait()
            raise
    took = f"{time.monotonic() - begin:.0f} s"
    return Check(part.name, status == 0, f"{took}; {why}, {log}" if why else took)


def pack(folder: Path, into: Path) -> None:
    """All of *folder* as one .tar.gz."""
    with tarfile.open(into, "w:gz") as tar:
        tar.add(folder, arcname=folder.name)


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:400] if lines else "it said nothing"
