"""The machine and the versions a figure was taken with. A figure without them is a rumour."""

import os
import platform
import shutil
import subprocess
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import zmq

from djinn_zmq.settings import GIB
from djinn_zmq.version import __version__

# Read from the installed metadata: importing torch to learn its version takes seconds.
PACKAGES = ("pyzmq", "msgspec", "numpy", "torch", "transformers", "grpcio", "nnsight",
            "cupy-cuda12x", "cupy-cuda13x")  # fmt: skip
GPU_NAMES = Path("/proc/driver/nvidia/gpus")


@dataclass(frozen=True, slots=True)
class Machine:
    """cores: CPUs this process may use. memory: bytes. load: of the last minute, at the start.

    versions: package → version, those that are installed. gpus: names, empty without one.
    """

    cpu: str
    cores: int
    memory: int
    kernel: str
    gpus: tuple[str, ...]
    load: float
    versions: dict[str, str]

    def __str__(self) -> str:
        gpus = "".join(f", {gpu}" for gpu in self.gpus)
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return (
            f"{self.cpu}, {self.cores} cores, {self.memory / GIB:.0f} GiB{gpus}, "
            f"Linux {self.kernel}, load {self.load:.2f}\n{versions}"
        )

    def as_json(self) -> dict[str, Any]:
        """Without the versions, which stand beside it in the results."""
        fields = asdict(self)
        del fields["versions"]
        return {**fields, "gpus": list(self.gpus)}


def this_machine() -> Machine:
    return Machine(
        cpu=_cpu_model(),
        cores=len(os.sched_getaffinity(0)),
        memory=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        kernel=platform.release(),
        gpus=_gpus(),
        load=os.getloadavg()[0],
        versions=_versions(),
    )


def _versions() -> dict[str, str]:
    found = {
        "djinn_zmq": __version__,
        "python": platform.python_version(),
        "libzmq": zmq.zmq_version(),
    }
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("model name", "Model"):
            return value.strip()
    return platform.machine()


def _gpus() -> tuple[str, ...]:
    """From the driver's own files, else from nvidia-smi (containers often hide the files)."""
    try:
        texts = [path.read_text() for path in sorted(GPU_NAMES.glob("*/information"))]
    except OSError:
        texts = []
    names = [
        line.partition(":")[2].strip()
        for text in texts
        for line in text.splitlines()
        if line.startswith("Model:")
    ]
    return tuple(names) or _asked_of_nvidia_smi()


def _asked_of_nvidia_smi() -> tuple[str, ...]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    command = [program, "--query-gpu=name", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(line.strip() for line in said.stdout.splitlines() if line.strip())
