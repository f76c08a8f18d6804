"""Checkpoints in files that a server of before left in the state directory.

They belong to whom they belonged, under the numbers they had, until their owner claims them for a
session: then they are the session's, and go with it. Until then they stay, and count as what is on the disk.
What is no whole file of a checkpoint is left alone, and what nobody can go on from is removed; both are named
in the log.

The directory is one server's at a time: it removes, at its start and later, what nobody can need any more.
"""

import contextlib
import fcntl
import logging
import os
from dataclasses import dataclass
from pathlib import Path

import msgspec

from djinn_zmq.errors import AddressInUse, BadFile, StartError, UnknownCheckpoint
from djinn_zmq.memory import files
from djinn_zmq.memory.files import Saved
from djinn_zmq.server.registry import STRANGER, KeptRecord, Session
from djinn_zmq.settings import private_dir
from djinn_zmq.wire.messages import ModelInfo
from djinn_zmq.wire.tensors import File, Tensor, inline
from djinn_zmq.wire.tiers import Kept

_log = logging.getLogger(__name__)

NUMBERS = 1 << 63  # of checkpoints, with 0, which is none


@dataclass(frozen=True, slots=True)
class Found:
    saved: Saved
    kept: Kept  # of no session yet
    owner: str
    file: int  # its inode: several numbers may share one


class Returned:
    def __init__(self, state: str | None) -> None:
        """state: the directory, made if it is not there. Raises AccessDenied where it is not ours
        alone, AddressInUse where another server has it, StartError where it cannot hold what is kept."""
        self._found: dict[int, Found] = {}
        self._lock = -1
        if state is not None:
            folder = private_dir(Path(state))
            self._lock = _locked(folder)
            try:
                _check_links(folder)
            except BaseException:
                self.close()
                raise
            for path in sorted(folder.iterdir()):
                self._look_at(path)

    def close(self) -> None:
        """Another server may have the directory."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _look_at(self, path: Path) -> None:
        scratch = path.name.startswith(".") and path.name.endswith(files.SCRATCH)
        if scratch and path.is_file():  # half-made by one that was killed
            path.unlink(missing_ok=True)
            return
        try:
            number = _number_of(path)
            saved = files.read(path)
            owner = saved.metadata.get("owner")
            if owner is None:
                raise BadFile("it names no owner")
        except (ValueError, BadFile) as exc:
            _log.warning("%s in the state directory is left alone: %s", path.name, exc)
            return
        reason = ""
        if needs := saved.metadata.get(files.NEEDS):
            reason = f"what it needs beside its file ({needs}) ended with its engine"
        elif owner.startswith(STRANGER):
            reason = "it was of a connection without a key, which is over"
        if reason:
            _log.warning("checkpoint %x after layer %d is removed: %s", number, saved.layer, reason)
            path.unlink(missing_ok=True)
            return
        where = File(number, saved.metadata.get(files.MARK, ""))
        hidden = Tensor(saved.hidden.dtype, saved.hidden.shape, where)
        kept = Kept(number, 0, number, saved.layer, hidden, tiers=("disk",))
        self._found[number] = Found(saved, kept, owner, path.stat().st_ino)

    def __len__(self) -> int:
        return len(self._found)

    @property
    def nbytes(self) -> int:
        """Bytes of their files."""
        return sum({one.file: one.saved.nbytes for one in self._found.values()}.values())

    def of(self, owner: str, info: ModelInfo) -> tuple[Kept, ...]:
        """What there is of *owner*'s for the model *info*."""
        return tuple(
            one.kept
            for one in self._found.values()
            if one.owner == owner and not files.differences(one.saved, info)
        )

    def claim(
        self, numbers: tuple[int, ...], session: Session, info: ModelInfo
    ) -> list[KeptRecord]:
        """Make them checkpoints of *session*. Raises UnknownCheckpoint or BadFile; then none is."""
        chosen = []
        for number in dict.fromkeys(numbers):
            one = self._found.get(number)
            if one is None or one.owner != session.owner:
                raise UnknownCheckpoint(
                    f"checkpoint {number:#x} did not come back from the disk, or is not yours"
                )
            files.check_model(one.saved, info)
            chosen.append(one)
        records = []
        for one in chosen:
            kept = msgspec.structs.replace(one.kept, session=session.id)
            records.append(KeptRecord(kept, inline(files.load(one.saved, one.saved.ids))))
        for one in chosen:
            del self._found[one.kept.id]
        return records


def _check_links(folder: Path) -> None:
    """Raises StartError where a file of *folder* cannot have two names: checkpoints of the same bytes
    share one."""
    names = [folder / f".{number}{files.SCRATCH}" for number in range(2)]
    try:
        names[0].touch(0o600)
        os.link(*names)
    except OSError as exc:
        raise StartError(
            f"checkpoints cannot be kept in {folder}: {exc.strerror}. Choose a directory with --state "
            "that can be written to, on a filesystem that has hard links"
        ) from exc
    finally:
        for name in names:
            # Of a read-only filesystem: not there, and not to be removed.
            with contextlib.suppress(OSError):
                name.unlink()


def _locked(folder: Path) -> int:
    """Hold the lock on the directory itself: no lock file is left. It goes with the process."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as exc:
        os.close(fd)
        raise AddressInUse(
            f"a server already keeps checkpoints in {folder}: stop it, or choose another directory "
            "with --state"
        ) from exc
    return fd


def _number_of(path: Path) -> int:
    """The checkpoint whose file this is by its name. Raises BadFile for another name: nobody would find it under its
    number, or could be told of it."""
    try:
        number = int(path.name.removesuffix(files.SUFFIX), 16)
    except ValueError:
        number = 0
    if not 0 < number < NUMBERS or path != files.path_of(path.parent, number):
        raise BadFile("its name is none that a server gives")
    return number
