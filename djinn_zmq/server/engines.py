"""An engine as the server sees it: a process, a link, a lease socket, and what waits for it."""

import contextlib
import dataclasses
import json
import logging
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from djinn_zmq.bus import lease as lease_bus
from djinn_zmq.bus.lease import LeaseSocket
from djinn_zmq.bus.link import Link
from djinn_zmq.errors import Busy, Lost, StartError
from djinn_zmq.settings import MIB, Settings, format_bytes
from djinn_zmq.wire import codec, states
from djinn_zmq.wire.codec import Header
from djinn_zmq.wire.messages import Broken, EngineInfo, Load, ModelInfo, Ready, Retire
from djinn_zmq.wire.ops import Op

_log = logging.getLogger(__name__)

CRASH_WINDOW_S = 60.0
RETRY_S = 60.0  # one that was given up is not tried again before
READY = states.Engine.READY
UP = (READY, states.Engine.LOADING)  # there is a process that takes what it is told
HELD_LIMIT = 4096  # messages kept for an engine that is coming up
HELD_BYTES = 64 * MIB  # of clients' messages among them

Outgoing = tuple[bytes, bytes, Sequence[bytes | memoryview]]  # envelope, frame, buffers


class Engine:
    """Starts one engine process, restarts it, and accounts for every request it owes an answer."""

    def __init__(
        self,
        index: int,
        device: str,
        dtype: str,
        settings: Settings,
    ) -> None:
        self.index = index
        self.device = device
        self.dtype = dtype
        self.state = states.Engine.DOWN
        self.detail = ""
        self.restarts = -1
        self.farewell = ""  # why the process ended, in its own words
        self.device_memory = 0  # bytes its device tier may have
        self.models: dict[str, ModelInfo] = {}
        self.sources: dict[str, str] = {}  # of every model it was told to load, for its successor
        self.loading: str | None = None
        self.tells = False  # was it told to tell of runs?
        # (session, request) → who asked last, which is who is answered, and what.
        self.owed: dict[tuple[int, int], tuple[bytes, Header]] = {}
        self.retry_s = 0.0  # FAILED: from then on it may be started once more (monotonic)
        # FAILED, and asked for: starts it once more, or raises Lost.
        self.on_wanted: Callable[[Engine], None] = lambda engine: None
        self._death = ""  # how the last process ended
        self._started_s = 0.0  # monotonic: when it began
        self._settings = settings
        self._held: deque[Outgoing] = deque()
        self._held_asked = self._held_bytes = 0  # of these are clients'
        self._deaths: deque[float] = deque()
        self._process: subprocess.Popen[bytes] | None = None
        self.link: Link | None = None
        self.lease: LeaseSocket | None = None

    @property
    def pid(self) -> int:
        return self._process.pid if self._process is not None else 0

    def start(self) -> None:
        """Spawn the process. It says READY over the link when it can be spoken to.

        Raises StartError, ArenaFull, OSError where the system has no more to give.
        """
        self.advance("start")
        self.restarts += 1
        self.link, link_ends = Link.create(self._settings)
        try:
            self.lease, theirs = lease_bus.pair()
        except BaseException:
            link_ends.close()
            raise
        try:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "djinn_zmq.engine",
                    f"--link={','.join(map(str, link_ends))}",
                    f"--lease-fd={theirs.fileno()}",
                    f"--server-pid={os.getpid()}",
                    f"--device={self.device}",
                    f"--index={self.index}",
                    f"--settings={json.dumps(dataclasses.asdict(self._settings))}",
                ],
                pass_fds=[theirs.fileno(), *link_ends],
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # a Ctrl-C in the terminal is the server's to handle
            )
        except OSError as exc:
            raise StartError(f"cannot start an engine: {exc}") from exc
        finally:
            theirs.close()
            link_ends.close()
        self._started_s = time.monotonic()
        self.detail = "starting: python and torch are being loaded"
        _log.info("engine %d starts on %s, pid %d", self.index, self.device, self.pid)

    def advance(self, event: str) -> None:
        self.state = states.advance(states.ENGINE, self.state, event)

    def on_ready(self, ready: Ready) -> None:
        """The process is up: tell it all that waited."""
        self.advance("ready")
        self.device_memory = ready.device_memory
        self.detail = ""
        assert self.link is not None
        for envelope, frame, buffers in self._held:  # bounded here, so the link takes them all
            self.link.lane.queue(envelope, frame, buffers)
        self._hold_nothing()

    # ---- messages

    def tell(
        self, op: Op, meta: Any, *, session: int = 0, request: int = 0, asked: bool = False
    ) -> None:
        """A message of the server's own: kept however many wait, else the server would end by it.

        asked: a client brings it about as often as it likes. Raises Busy where as much waits as may.
        """
        frame = codec.encode(op, meta, session=session, request=request)
        self._put(b"", frame, (), bounded=asked)

    def wake(self) -> None:
        """A request for it is most likely being read: have it wake up meanwhile, where it has no other."""
        if self.state is READY and not self.owed and self.link is not None:
            self.link.lane.ring()

    def forward(
        self,
        envelope: bytes,
        header: Header,
        frame: bytes,
        buffers: Sequence[bytes | memoryview],
    ) -> None:
        """Pass on a client's request, and owe it an answer from now on.

        Raises Busy where the engine's queue is full, Lost where it stays down.
        """
        if self.state is READY and self.link is not None:
            self.link.send(envelope, frame, buffers)
        else:
            self.pass_on(envelope, frame, buffers)
        self.owed[header.session, header.request] = envelope, header

    def pass_on(self, envelope: bytes, frame: bytes, buffers: Sequence[bytes | memoryview]) -> None:
        """Pass on a client's message. Raises as `forward` does."""
        if self.state is states.Engine.FAILED:
            self.on_wanted(self)
        self._put(envelope, frame, buffers, bounded=True)

    def _put(
        self,
        envelope: bytes,
        frame: bytes,
        buffers: Sequence[bytes | memoryview],
        *,
        bounded: bool,
    ) -> None:
        if self.state in UP:
            assert self.link is not None
            self.link.send(envelope, frame, buffers, bounded=bounded)
        elif self.state is states.Engine.FAILED:
            pass  # who follows, if anybody does, is told all that still counts
        else:
            self._hold(envelope, frame, buffers, bounded=bounded)

    def _hold(
        self,
        envelope: bytes,
        frame: bytes,
        buffers: Sequence[bytes | memoryview],
        *,
        bounded: bool,
    ) -> None:
        """Keep a message until the engine is up. Raises Busy where too many of clients' wait, or too much."""
        if bounded:
            if self._held_asked >= HELD_LIMIT:
                raise Busy(
                    f"engine {self.index} is {self.state} and {HELD_LIMIT} messages wait for it"
                )
            nbytes = len(frame) + sum(map(len, buffers))
            if self._held_bytes + nbytes > HELD_BYTES:
                raise Busy(
                    f"engine {self.index} is {self.state}: a message of {format_bytes(nbytes)}, "
                    f"{format_bytes(HELD_BYTES - self._held_bytes)} free of {format_bytes(HELD_BYTES)} for "
                    "what waits for it; ask again when it is up"
                )
            self._held_bytes += nbytes
            self._held_asked += 1
        self._held.append((envelope, frame, buffers))

    def _hold_nothing(self) -> None:
        self._held.clear()
        self._held_asked = self._held_bytes = 0

    def load(self, name: str, source: str) -> None:
        """Ask for a model. Its LOAD reply, or failure, comes over the link."""
        self.sources[name] = source
        self.loading = self.loading or name
        self.tell(Op.LOAD, Load(name, source, self.dtype))

    def retire(self, arena: int) -> None:
        """Have the engine unmap *arena*."""
        self.post(Retire(arena))

    def post(self, news: Retire | Broken) -> None:
        """Tell it *news* on the lease socket, when there is room for them. Nobody is told where it is gone."""
        if self.lease is not None:
            with contextlib.suppress(Lost):
                self.lease.post(news)

    # ---- ends

    def bury(self) -> tuple[list[tuple[bytes, Header]], str]:
        """The process is dead: close what led to it. Returns what it still owed, and the reason."""
        status = self._end_process()
        owed = list(self.owed.values())
        self.owed.clear()
        self.models.clear()
        self.loading = None
        self.tells = False
        self._hold_nothing()
        self._close_ends()
        now = time.monotonic()
        self._deaths.append(now)
        while self._deaths[0] < now - CRASH_WINDOW_S:
            self._deaths.popleft()
        said, self.farewell = self.farewell, ""
        reason = f"engine {self.index} (pid {self.pid}) {said or _ending(status)}"
        if len(self._deaths) > self._settings.engine_restarts:
            self._death = f"{reason}, {len(self._deaths)} times in {CRASH_WINDOW_S:.0f} s"
            self._fail()
        else:
            self.advance("die")
            self._death = reason
        self.detail = self._death
        _log.warning("%s; it had run for %.1f s", self.detail, now - self._started_s)
        return owed, reason

    def give_up(self, reason: str) -> None:
        """It cannot be started again, for *reason*: it stays down."""
        self._close_ends()
        self._fail()
        self.detail = f"{self._death}; it cannot be started again: {reason}"
        _log.error("engine %d cannot be started again: %s", self.index, reason)

    def _fail(self) -> None:
        self.advance("give up")
        self.retry_s = time.monotonic() + RETRY_S

    def why_down(self) -> str:
        """Of a FAILED one: why, and how it comes back."""
        left_s = max(1.0, self.retry_s - time.monotonic())
        return (
            f"engine {self.index} is down: {self.detail}; ask again in {left_s:.0f} s or later, then it is "
            "started once more"
        )

    def hang_up(self) -> None:
        """Have the process end: its lease socket closes. `stop` waits for it."""
        if self.state is states.Engine.STARTING:
            self._end_process()  # it holds nothing yet, and would notice only with torch imported
        self._close_ends()

    def stop(self, timeout_s: float) -> None:
        """End the process: it is hung up on, has *timeout_s*, then it is killed."""
        self.hang_up()
        if self._process is not None:
            try:
                self._process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                ran_s = time.monotonic() - self._started_s
                _log.warning(
                    "engine %d did not end in time: killed; it had run for %.1f s",
                    self.index,
                    ran_s,
                )
            self._end_process()
        if self.state is not states.Engine.STOPPED:
            self.advance("stop")

    def _end_process(self) -> int:
        if self._process is None:
            return 0
        if self._process.poll() is None:
            self._process.kill()
        return self._process.wait()

    def _close_ends(self) -> None:
        if self.lease is not None:
            self.lease.close()
            self.lease = None
        if self.link is not None:
            self.link.close()
            self.link = None

    def limit(self, tier: str) -> int:
        """Bytes that *tier* of this engine may have."""
        if tier == "device":
            return self.device_memory
        return self._settings.host_memory if tier == "host" else self._settings.disk

    def info(self) -> EngineInfo:
        return EngineInfo(
            index=self.index,
            device=self.device,
            state=str(self.state),
            pid=self.pid,
            restarts=max(0, self.restarts),
            detail=self.detail,
            resident=_resident(self.pid),
        )


def _ending(status: int) -> str:
    return f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"


def _resident(pid: int) -> int:
    """Bytes of memory *pid* holds, 0 where it is gone."""
    try:
        with open(f"/proc/{pid}/statm") as file:
            return int(file.read().split()[1]) * 4096
    except OSError:
        return 0
