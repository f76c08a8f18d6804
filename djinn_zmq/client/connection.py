"""One client's connection: requests out, replies in, shared memory where there is any.

What a client does is written once, as generators that yield `Call`s and are sent the replies.
`client/waiting.py` runs them while the caller waits; `aio.py` awaits instead.
"""

import os
import threading
import weakref
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from time import perf_counter_ns
from typing import TYPE_CHECKING, NoReturn

import msgspec

from djinn_zmq.bus.dealer import Dealer
from djinn_zmq.bus.lane import Lane, Piece
from djinn_zmq.client import checks
from djinn_zmq.client.calls import LOOK_S, PIECE, Arriving, Call, Operation
from djinn_zmq.client.lanes import Lanes
from djinn_zmq.client.leftovers import Leftovers, kept_by
from djinn_zmq.client.sharing import Sharing
from djinn_zmq.errors import (
    Busy,
    Cancelled,
    Closed,
    DeadlineExceeded,
    DjinnError,
    Lost,
    ProtocolError,
    RequestError,
    Unreachable,
)
from djinn_zmq.settings import Settings, format_bytes
from djinn_zmq.version import __version__
from djinn_zmq.wire import codec, messages
from djinn_zmq.wire.codec import BUFFERS_LIMIT, EXAMPLE_LIMIT, NOT_A_REPLY, Message
from djinn_zmq.wire.messages import Flag
from djinn_zmq.wire.ops import TO_ENGINE, Op
from djinn_zmq.wire.tensors import INLINE_LIMIT

if TYPE_CHECKING:  # a room that only those with a key need
    from djinn_zmq.bus.keys import ClientKeys

Frames = tuple[Piece, Sequence[Piece]]

WINDOW = 8  # pieces asked for at once
PROGRESS_CREDIT = 1000
ASK_S = 2.0  # what is asked of the server after an answer did not come
FIRST_LOOK_S = 0.2  # as LOOK_S, until the server has answered
SHARED = int(Flag.SHARED)
ON_LANES = TO_ENGINE | {Op.PING, Op.RELEASE}
DEADLINE_LIMIT_MS = 2**32 - 1  # seven weeks: what the header can say


class Connection:
    def __init__(
        self,
        endpoint: str,
        keys: "ClientKeys | None",
        settings: Settings,
        *,
        shared: bool = True,
        lane: bool = True,
    ) -> None:
        """Connect the socket; `hello` finds out whether anybody answers.

        shared: use shared memory where the server offers it. lane: for requests too.
        """
        self.endpoint = endpoint
        self.settings = settings
        self._meta_limit = settings.meta_limit
        self.keys = keys
        self.sharing = Sharing(settings)
        wanted = checks.flag("lane", lane)
        self.lanes = Lanes(self.sharing, settings, wanted=wanted, on_change=self._on_lanes_change)
        self._want_shared = checks.flag("shared", shared)
        self._dealer = Dealer(endpoint, settings, keys)
        _connections.add(self)
        self._dealer.socket.rcvtimeo = int(FIRST_LOOK_S * 1000)
        self.met = False  # has the server answered?
        # Random, so that a client that comes back never asks under a number of its past life.
        self._last_request = int.from_bytes(os.urandom(5), "little") << 20
        self._calls: dict[int, Call] = {}  # what waits, by request
        self._abandoned: deque[int] = deque()  # requests whose parts nobody takes
        self.leftovers = Leftovers(self.sharing, self.lanes, self._say)
        self._lock = threading.RLock()  # ZeroMQ sockets are for one thread at a time
        self._example: Piece = b""  # an answer, of those that came
        self._closed = ""  # why it is

    # ---- what waits

    def settle(self, request: int, call: Call) -> Message:
        del self._calls[request]
        reply = call.reply
        if type(reply) is Message:
            return reply
        assert isinstance(reply, DjinnError)
        raise reply

    def give_up(self, request: int) -> None:
        """Nobody waits for *request* any more: what has come for it, and what will, is given back."""
        call = self._calls.pop(request)
        if call.arriving is not None:
            for part in call.arriving.parts:
                self.give_back(part)
        if type(call.reply) is Message:
            self.give_back(call.reply)

    def cancel(self, request: int, session: int) -> None:
        """Tell the engine that nobody waits for *request* any more; its answer is not awaited."""
        if session and not self._closed:
            meta = messages.Cancel(request)
            number = self._next_request()
            frame = codec.encode(Op.CANCEL, meta, request=number, session=session)
            call = self._calls.get(request)
            self._send(frame, (), None if call is None else call.lane)

    def why_late(self, call: Call) -> Operation[DjinnError]:
        """The error for *call*, whose time has passed: with what the server says of an engine that is not
        there to answer in time."""
        if call.data is not None:
            nbytes = format_bytes(len(call.data))
            return DeadlineExceeded(
                f"{nbytes} were not uploaded to {self.endpoint} within {call.timeout_s:g} s"
            )
        late = f"no answer from {self.endpoint} in {call.timeout_s:g} s"
        index = self.lanes.engine_of(call.session) if call.op in ON_LANES else None
        if index is None:
            return Unreachable(late)
        try:
            reply = yield Call(Op.STATUS, messages.Status(), timeout_s=ASK_S)
        except DjinnError:
            return Unreachable(late)
        for engine in reply.meta.engines:
            if engine.index == index and engine.state != "ready":
                doing = engine.detail or engine.state
                if not doing.startswith(engine.state):
                    doing = f"{engine.state} {doing}"
                return Unreachable(f"{late}: engine {index} is {doing}; give it more time")
        return Unreachable(late)

    # ---- answers in parts

    def has_news(self, request: int) -> bool:
        """Is there a part, or the reply, of an answer that comes in parts? True once given up."""
        call = self._calls.get(request)
        if call is None or call.arriving is None:
            return True
        return bool(call.arriving.parts) or call.reply is not None

    def take_part(self, request: int) -> Message:
        """The next part that has come, or the reply. Asks for more where half the window is taken."""
        call = self._calls.get(request)
        if call is None or call.arriving is None:
            raise Cancelled("its answer was given up before all of its parts were taken")
        arriving = call.arriving
        if not arriving.parts:
            return self.settle(request, call)
        arriving.taken += 1
        if 2 * arriving.taken >= arriving.window and call.reply is None:
            self._send_more(request, call, arriving)
        return arriving.parts.popleft()

    def _send_more(self, request: int, call: Call, arriving: Arriving) -> None:
        self._say(Op.MORE, messages.More(request), call.session, call.lane, arriving.taken)
        arriving.taken = 0

    def abandon(self, request: int) -> None:
        """Nobody takes the rest of an answer's parts: have the engine stop making them."""
        call = self._calls.get(request)
        if call is not None and call.arriving is not None and not self._closed:
            self.cancel(request, call.session)
            self.give_up(request)

    def abandon_later(self, request: int) -> None:
        """The same before the next request is sent: safe to call from a finalizer."""
        self._abandoned.append(request)

    # ---- sending

    def _next_request(self) -> int:
        self._last_request += 1
        return self._last_request

    def send(self, call: Call) -> int:
        """Send *call* and return its request number; the reply is still to be waited for."""
        if self._closed:
            raise Closed(self._closed)
        if self._abandoned or self.leftovers.noted:
            self._tidy_up()
        request = self._last_request = self._last_request + 1
        session, buffers = call.session, call.buffers
        count = len(buffers)
        try:
            frame = codec.encode(
                call.op,
                call.meta,
                flags=SHARED if self.sharing.lease is not None else 0,
                request=request,
                session=session,
                buffers=count,
                deadline_ms=0 if call.timeout_s is None else _deadline_ms(call.timeout_s),
                credit=call.parts or (PROGRESS_CREDIT if call.progress is not None else 0),
            )
        except OverflowError as exc:  # a layer of 2**70, say
            raise RequestError("a whole number that takes more than 64 bits can't be sent") from exc
        except (TypeError, UnicodeEncodeError) as exc:  # half a character
            raise RequestError(f"what was asked for can't be sent: {exc}") from exc
        if len(frame) > self._meta_limit or count > BUFFERS_LIMIT:
            raise RequestError(_too_much(len(frame), self._meta_limit, count))
        if session:
            if self.lanes.wanted and call.op in ON_LANES:
                call.lane = self._lane_of(session)
        elif not self._lease_holds():  # what stands in that server's place would answer
            self._lose_all()
        call.sent_ns = perf_counter_ns()  # now: the answer may be there before send is back
        if call.lane is None:
            self._dealer.send(frame, buffers)
        else:
            try:
                call.lane.send(b"", frame, buffers)
            except ProtocolError as exc:
                self._drop_broken(call.lane, exc)
                raise
        if call.data is not None:
            self._send_pieces(request, session, call.data)
        self._calls[request] = call
        if call.parts:
            call.arriving = Arriving(call.parts)
        return request

    def _tidy_up(self) -> None:
        """Say what nobody refers to any more."""
        while self._abandoned:
            self.abandon(self._abandoned[0])
            self._abandoned.popleft()
        if self.leftovers.noted:
            self.leftovers.say()

    def _lane_of(self, session: int) -> Lane | None:
        """The way of a request to the engine: a lane, or None for the bus. Raises Lost."""
        lane = self.lanes.of(session)
        if lane is None or not self.lanes.disturbed():
            return lane
        self.check_alive()
        return self.lanes.of(session)

    def _say(
        self, op: int, meta: msgspec.Struct, session: int, lane: Lane | None, credit: int = 0
    ) -> None:
        """Send a message that is not answered."""
        request = self._next_request()
        frame = codec.encode(
            op, meta, flags=Flag.ONE_WAY, request=request, session=session, credit=credit
        )
        self._send(frame, (), lane)

    def _send(self, frame: bytes, buffers: Sequence[Piece], lane: Lane | None) -> None:
        """Send a message nobody waits for the answer of."""
        if lane is not None:
            if lane.closed:
                return
            try:
                lane.send(b"", frame, buffers)
                return
            except ProtocolError as exc:
                self._drop_broken(lane, exc)
        self._dealer.send(frame, buffers)

    def _send_pieces(self, request: int, session: int, data: memoryview) -> None:
        try:
            for offset in range(0, len(data), PIECE):
                self._send_piece(request, session, offset, data[offset : offset + PIECE])
        except BaseException:  # a KeyboardInterrupt: the server is not to keep room for the rest
            with suppress(Busy):
                self._send_piece(request, session, len(data), b"")  # refused, and all with it
            raise

    def _send_piece(self, request: int, session: int, offset: int, data: Piece) -> None:
        frame = codec.encode(
            Op.CHUNK,
            messages.Chunk(offset),
            flags=Flag.ONE_WAY,
            request=request,
            session=session,
            buffers=1,
        )
        self._dealer.send(frame, [data])

    # ---- receiving

    def receive(self) -> Frames | None:
        """A message that is there already, on the bus or a lane, or None. Drops lanes that make no sense."""
        frames = self._dealer.receive()
        if frames is not None:
            return frames
        for lane in self.lanes:
            lane.hush()
            try:
                message = lane.receive()
            except ProtocolError as exc:
                self._drop_broken(lane, exc)
                return self.receive()
            if message is not None:
                return message[1:]
        return None

    def take(self, frame: Piece, buffers: Sequence[Piece]) -> None:
        header = codec.peek(frame)
        call = self._calls.get(header.request)
        if call is None:  # given up, or the server's knock
            if header.flags & Flag.ERROR and not header.request:  # no request's: it speaks of all
                self.fail_all(codec.error_of(codec.decode(frame, buffers, header)))
            elif not header.flags & (Flag.ERROR | Flag.PROGRESS):
                self.give_back(codec.decode(frame, buffers, header))
            return
        call.arrived_ns = perf_counter_ns()
        try:
            message = codec.decode(frame, buffers, header)
        except ProtocolError as exc:
            call.reply = exc
            return
        except KeyboardInterrupt:  # it has come all the same: `give_up` is to find it
            self.take(frame, buffers)
            raise
        if header.flags & NOT_A_REPLY:
            self._take_no_reply(call, message)
        else:
            call.reply = message
            if not buffers and len(frame) <= EXAMPLE_LIMIT:
                self._example = frame

    def _take_no_reply(self, call: Call, message: Message) -> None:
        flags = message.header.flags
        if flags & Flag.PROGRESS:
            if message.meta.held is not None:
                call.hold(message.meta.held)
            elif call.progress is not None:
                call.progress(message.meta)
        elif flags & Flag.ERROR:
            call.reply = codec.error_of(message)
        elif call.arriving is not None:
            call.arriving.parts.append(message)
        else:
            call.reply = ProtocolError("a part of an answer that was not asked for in parts")

    def give_back(self, message: Message) -> None:
        """*message* answers a request nobody waits for any more: release what it keeps."""
        for number in kept_by(message.meta):
            self.leftovers.add(message.header.session, number)
        if isinstance(message.meta, messages.Opened):
            self.leftovers.add(message.meta.session, 0)

    def waits_for(self, request: int) -> bool:
        return request in self._calls

    def reply_to(self, request: int) -> Message | DjinnError | None:
        """What came for *request* so far."""
        call = self._calls.get(request)
        return None if call is None else call.reply

    def fail_all(self, error: DjinnError) -> None:
        for call in self._calls.values():
            if call.reply is None:
                call.reply = error

    def alive(self) -> bool:
        """Is the other end still there, as far as this machine can tell?"""
        return not self._dealer.lost() and self._lease_holds()

    def _lease_holds(self) -> bool:
        """The same by the lease socket alone, where there is one: at its end it ends for good."""
        try:
            for news in self.sharing.news():
                if isinstance(news, messages.Broken):
                    self._on_broken_lane(news)
        except Lost:
            return False
        return True

    def gone(self) -> Lost:
        """For what was asked of a server that is gone. One that is started in its place knows nothing of this
        client: its lease has ended, and its sessions with it. Across a network it may be the connection that
        was cut: libzmq makes another, and the sessions of a key are there still."""
        gone = f"the server at {self.endpoint} is gone"
        if not self.endpoint.startswith("tcp://"):
            return Lost(f"{gone}: once it is back, connect again")
        gone += ", or the connection to it was cut"
        if self.keys is None:
            return Lost(f"{gone}, which ends this client's sessions: connect again")
        return Lost(
            f"{gone}: ask again, a key's sessions outlive a connection for a while (djinn serve --grace-s); "
            "where they have ended, or the server has, connect again"
        )

    def check_alive(self) -> None:
        """Raises Lost where the server is gone; then all that was asked of it is, though it be back already."""
        if not self.alive():
            self._lose_all()

    def _lose_all(self) -> NoReturn:
        lost = self.gone()
        self.fail_all(lost)
        raise lost

    def look(self) -> None:
        """Raises Lost where the server is gone, as far as this machine can tell. Does not wait for
        another thread that uses the connection: that finds out by itself."""
        if self._lock.acquire(blocking=False):
            try:
                if not self._closed:
                    self.check_alive()
            finally:
                self._lock.release()

    def _on_broken_lane(self, news: messages.Broken) -> None:
        """The engine at its other end is gone: what was asked there is lost, with the reason. The
        next request takes the bus, or a lane to the engine that follows."""
        broken = self.lanes.on_broken(news)
        if broken is None:
            return
        lane, error = broken
        try:
            while (message := lane.receive()) is not None:  # what it still said
                self.take(*message[1:])
        finally:  # also where that is nonsense, or the caller's own progress function fails
            self._drop_broken(lane, error)

    def _drop_broken(self, lane: Lane, error: DjinnError) -> None:
        """*lane* is of no use any more, because its engine is gone or its ring is nonsense: what was asked
        there, and is not answered yet, fails with *error*."""
        for call in self._calls.values():
            if call.lane is lane and call.reply is None:
                call.reply = error
        self.lanes.drop(lane)

    def _on_lanes_change(self) -> None:
        """A lane was made, or is about to be closed."""

    def __reduce__(self) -> NoReturn:
        """Models, runs and checkpoints all refer to it: this is what pickle says of any of them."""
        raise TypeError(
            "a connection and what belongs to it stay in their process: connect anew in another; "
            "a checkpoint's save(path) makes a file of it"
        )

    def check_waits(self) -> None:
        """Raises TypeError for `with` in asyncio code: nobody would await what ends the block."""

    # ---- the first exchange

    def left_alone(self) -> bool:
        """Is the socket file to which the first question went one that a killed server left?"""
        return (
            not self.met and self.endpoint.startswith("ipc://") and bool(self._dealer.why_silent())
        )

    def hello(self, timeout_s: float) -> Operation[messages.Welcome]:
        """Meet the server, and share memory with it where it is the same user's.

        Raises Unreachable where nobody answers within *timeout_s*.
        """
        timeout_s = checks.seconds("timeout_s", timeout_s)
        try:
            reply = yield Call(
                Op.HELLO, messages.Hello(__version__, os.getpid()), timeout_s=timeout_s
            )
        except (Busy, Lost) as exc:  # Busy: refused before the question was sent
            what = f"no server answers at {self.endpoint}"
            if why := self._dealer.why_silent():
                raise Unreachable(f"{what}: {why}") from exc
            if self._dealer.lost():  # at once, as a server does that does not know the key
                raise Unreachable(
                    f"{what}: what listens there ended the connection; check the endpoint and the key"
                ) from exc
            raise Unreachable(
                f"{what} within {timeout_s:g} s: start one with 'djinn serve', or check the endpoint "
                "and the key"
            ) from exc
        self.met = True
        self._dealer.socket.rcvtimeo = int(LOOK_S * 1000)
        welcome: messages.Welcome = reply.meta
        if welcome.lease_path and self._want_shared:
            try:
                self.sharing.join(welcome.lease_path, welcome.token)
            except (Unreachable, Lost):
                pass  # a container, or another mount: the bus serves as well, only slower
        self.lanes.wanted &= self.sharing.lease is not None
        return welcome

    # ---- ends

    @property
    def closed(self) -> bool:
        return bool(self._closed)

    def released_beside(self, session: int) -> tuple[int, ...]:
        """What of *session*'s nobody refers to any more, to be said in the request that is sent next: so its
        engine lets go of it behind what that request waits for, and it costs no message.

        Nothing where that takes the bus: a server is told, which lets go without the engine, too; nor where
        others are under way, which may fill the queue, so that this one is refused.
        """
        if not self.leftovers.noted or self._calls or self.lanes.of(session) is None:
            return ()
        return self.leftovers.take(session)

    def close(self) -> None:
        """Close sockets and maps. Everything the server holds for this client ends with it."""
        if self._closed:
            return
        self._closed = "the connection is closed"
        self.lanes.close()
        self.sharing.close()
        self._dealer.close()

    def _leave(self) -> None:
        """In a child that was forked: what both use would get mixed up, and while a child has the lease
        socket open, nobody sees its parent end."""
        if not self._closed:
            self._closed = (
                "the connection belongs to the process that it was forked from: connect anew"
            )
            self.lanes.leave()
            self.sharing.leave()
        self._lock = threading.RLock()  # a thread that is not here may have it


def _leave_to_parent() -> None:
    for connection in tuple(_connections):
        connection._leave()


_connections: "weakref.WeakSet[Connection]" = weakref.WeakSet()
os.register_at_fork(after_in_child=_leave_to_parent)


def _deadline_ms(timeout_s: float) -> int:
    """A timeout as the header carries it: 0 for one too long to say. Raises RequestError for none."""
    limit_ms = 1000 * checks.seconds(
        "timeout_s", timeout_s, "a positive number of seconds, or None"
    )
    return 0 if limit_ms > DEADLINE_LIMIT_MS else max(1, int(limit_ms))


def _too_much(nbytes: int, limit: int, buffers: int) -> str:
    """Why a request is not sent: whoever gets such a message takes its sender for one who lies, and drops him."""
    if buffers > BUFFERS_LIMIT:
        small = format_bytes(INLINE_LIMIT)
        return (
            f"{buffers} arrays of more than {small} in one request: at most {BUFFERS_LIMIT}; make one edit of "
            "several, or resume more than once"
        )
    return (
        f"a request of {format_bytes(nbytes)} beside its arrays: at most {format_bytes(limit)}; give a long text "
        "as token ids, and many edits as fewer"
    )
