"""The disk tier: a file a checkpoint, under the state directory, written and read beside the layers.

Two threads, one that writes and removes (in order) and one that reads: they sleep in system calls and
hold the GIL for microseconds. A wake-up tells the engine's loop that one of them is done. What is still to get
its name from the one is waited for by the other.
"""

import contextlib
import logging
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from djinn_zmq.errors import ArenaFull
from djinn_zmq.memory import files
from djinn_zmq.memory.files import Saved
from djinn_zmq.settings import format_bytes

_log = logging.getLogger(__name__)


class Disk:
    def __init__(self, folder: Path | None, limit: int, wake: Callable[[], None]) -> None:
        """folder: None where there is no disk tier. limit: bytes. wake: called by the threads."""
        self.folder = folder
        self.limit = limit if folder is not None else 0
        self.used = 0  # bytes of the files there are, and of those being written
        self.unclaimed = 0  # bytes of files that are no session's, and ours to leave room for
        self.trouble = ""  # what the last failed write said
        self._wake = wake
        self._writer = ThreadPoolExecutor(1, "djinn-disk-writer")
        self._reader = ThreadPoolExecutor(1, "djinn-disk-reader")
        self._under_way: set[Future[Any]] = set()  # threads take theirs out themselves
        self._naming: dict[int, Future[None]] = {}  # by the number that a file is given

    @property
    def busy(self) -> bool:
        """Is a thread reading or writing?"""
        return bool(self._under_way)

    def fits(self, nbytes: int) -> bool:
        return self.folder is not None and self.used + self.unclaimed + nbytes <= self.limit

    def full(self, nbytes: int) -> ArenaFull:
        free = max(0, self.limit - self.used - self.unclaimed)
        those = ""
        if self.unclaimed:
            those = f", {format_bytes(self.unclaimed)} of it with what model.returned() lists"
        return ArenaFull(
            f"{format_bytes(nbytes)} of disk asked, {format_bytes(free)} free, limit "
            f"{format_bytes(self.limit)}{those}: release checkpoints, or serve with more --disk"
        )

    def save(
        self,
        numbers: list[int],
        arrays: Mapping[str, np.ndarray],
        metadata: Mapping[str, str],
    ) -> "Future[Any]":
        """Write one file, linked under each checkpoint's number; under all or none. The caller counts
        its bytes."""
        assert self.folder is not None
        paths = [files.path_of(self.folder, number) for number in numbers]

        def work() -> None:
            made = paths[:1]
            try:
                files.write(paths[0], arrays, metadata)
                for path in paths[1:]:
                    os.link(paths[0], path)
                    made.append(path)
            except OSError:
                for path in made:
                    path.unlink(missing_ok=True)
                raise

        return self._watched(self._writer.submit(work))

    def link(self, number: int, other: int) -> None:
        """Checkpoint *other* shares the file of *number*. Where there can be no link it has none of its own:
        see `remove`."""
        assert self.folder is not None
        one, two = files.path_of(self.folder, number), files.path_of(self.folder, other)

        def work() -> None:
            try:
                os.link(one, two)
            except OSError as exc:
                _log.warning("checkpoint %#x has no file of its own: %s", other, exc)

        self._named(other, self._writer.submit(work))

    def _named(self, number: int, future: "Future[None]") -> None:
        """*number* has a file when *future* is done, which may be behind a large one that is being written."""
        self._naming = {one: its for one, its in self._naming.items() if not its.done()}
        self._naming[number] = future

    def load(self, number: int, target: memoryview, mark: str = "") -> "Future[Any]":
        """Read the hidden state of *number* into *target*. mark: of the file that was written; "": it had none.
        Raises (there) BadFile."""
        assert self.folder is not None
        path, named = files.path_of(self.folder, number), self._naming.get(number)

        def work() -> None:
            if named is not None:
                named.exception()
            saved = files.read(path, mark)
            if saved.hidden.nbytes != len(target):
                raise files.BadFile(
                    f"{path} holds {saved.hidden.nbytes} bytes of hidden, not {len(target)}"
                )
            files.read_into(saved, saved.hidden, target)

        return self._watched(self._reader.submit(work))

    def stored(self, number: int, mark: str = "") -> Saved:
        """What the file of *number* says of itself. mark: as in `load`. Raises BadFile where there is none."""
        assert self.folder is not None
        return files.read(files.path_of(self.folder, number), mark)

    def remove(self, number: int, heir: int = 0) -> None:
        """Checkpoint *number* has no file any more. heir: one that shared it, and has it now, whether it
        could be linked or not."""
        assert self.folder is not None
        path = files.path_of(self.folder, number)
        inherited = files.path_of(self.folder, heir)

        def work() -> None:
            with contextlib.suppress(FileNotFoundError):
                # A link of its own stays as it is: under *number* may stand another file by now.
                if heir and not inherited.exists():
                    path.replace(inherited)
                path.unlink()

        future = self._writer.submit(work)
        if heir:
            self._named(heir, future)

    def _watched(self, future: "Future[Any]") -> "Future[Any]":
        self._under_way.add(future)
        future.add_done_callback(self._done)
        return future

    def _done(self, future: "Future[Any]") -> None:
        self._under_way.discard(future)
        self._wake()

    def close(self) -> None:
        """Wait for what is under way, so that no half-made file stays."""
        self._writer.shutdown()
        self._reader.shutdown()
