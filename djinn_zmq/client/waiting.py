"""The connection of a client that waits: it runs an operation to its end before it returns."""

import time
from collections import deque
from contextlib import suppress

from djinn_zmq.bus.lane import Lane
from djinn_zmq.client.calls import LOOK_S, Call, Heard, Next, Operation, T
from djinn_zmq.client.connection import WINDOW, Connection, Frames
from djinn_zmq.errors import Closed, DjinnError, ProtocolError
from djinn_zmq.wire import codec
from djinn_zmq.wire.codec import Message


class WaitingConnection(Connection):
    """May be used by several threads; one of them waits at a time."""

    def drive(self, operation: Operation[T]) -> T:
        """Run *operation* to its end, waiting for each reply."""
        with self._lock:
            if not self._calls:  # else its engine is awake, or will be when that is done
                self.lanes.wake()
            try:
                step = next(operation)
                while True:
                    try:
                        if type(step) is Call:
                            reply = self._wait(self.send(step), step)
                        else:
                            reply = self._exchange(step)
                    except DjinnError as exc:
                        step = operation.throw(exc)
                    else:
                        step = operation.send(reply)
            except StopIteration as end:
                return end.value
            except DjinnError:
                raise
            except BaseException:  # a KeyboardInterrupt, or the caller's own progress function
                self._cancel_all()
                operation.close()  # now: an interpreter keeps its last error, and all that this refers to
                raise

    def _exchange(self, step: list[Call] | Next | Heard) -> Message | list[Message] | None:
        if isinstance(step, Next):
            return self._wait_part(step.request, step.timeout_s)
        if isinstance(step, Heard):
            step.subscriber.wait(LOOK_S)
            self.look()
            return None
        replies: list[Message] = []
        sent: deque[tuple[int, Call]] = deque()
        try:
            for call in step:
                if len(sent) == WINDOW:
                    replies.append(self._wait(*sent.popleft()))
                sent.append((self.send(call), call))
            while sent:
                replies.append(self._wait(*sent.popleft()))
        except BaseException as exc:
            if isinstance(exc, DjinnError):
                exc.add_note(f"in request {len(replies)} of {len(step)}, counted from 0")
                for request, _ in sent:  # one before them failed: nobody waits for these
                    self.give_up(request)
            for reply in replies:
                self.give_back(reply)
            raise
        return replies

    def _wait(self, request: int, call: Call) -> Message:
        limit_s = None if call.timeout_s is None else call.waits_until()
        if self._example and call.reply is None:
            # While others work: what reads an answer will not be cold when it comes.
            codec.decode(self._example)
        while call.reply is None:
            frames = self._hear(call.lane)
            if frames is not None:
                frame, buffers = frames
                self.take(frame, buffers)
            else:
                self._look(request, call, limit_s)
        return self.settle(request, call)

    def _wait_part(self, request: int, timeout_s: float | None = None) -> Message | None:
        if self._closed:
            raise Closed(self._closed)
        call = self._calls.get(request)
        if call is not None:
            limit = call.waits_until()
            until_s = None if timeout_s is None else time.monotonic() + timeout_s
            try:
                while not self.has_news(request):
                    left_s = LOOK_S if until_s is None else until_s - time.monotonic()
                    if left_s <= 0:
                        return None
                    frames = self._hear(call.lane, min(left_s, LOOK_S))
                    if frames is not None:
                        self.take(*frames)
                    else:
                        self._look(request, call, limit)
            except BaseException:  # a KeyboardInterrupt, or the caller's own progress function
                with suppress(DjinnError):  # who interrupts is not to get another error
                    self.abandon(request)
                raise
        return self.take_part(request)

    def _look(self, request: int, call: Call, limit_s: float | None) -> None:
        """Nothing has come for a while, or news have: is there still somebody who will answer?"""
        if not self.alive() or self.left_alone():
            self.fail_all(self.gone())
        elif call.late(limit_s):
            self.give_up(request)
            raise self.drive(self.why_late(call))

    def _hear(self, lane: Lane | None, timeout_s: float = LOOK_S) -> Frames | None:
        """The next message where an answer is to come; None after *timeout_s*, or with news."""
        if lane is None or lane.closed:
            if timeout_s < LOOK_S and not self._dealer.socket.poll(timeout_s * 1000):
                return None
            return self._dealer.receive(wait=True)
        try:
            message = self.lanes.hear(lane, timeout_s)
        except ProtocolError as exc:
            self._drop_broken(lane, exc)
            return None
        return None if message is None else message[1:]

    def _cancel_all(self) -> None:
        """The user gave up waiting: so should the engine. Answers that come in parts and are not
        waited for just now are none of this."""
        for request, call in list(self._calls.items()):
            if call.arriving is None:
                with suppress(DjinnError):  # who interrupts is not to get another error
                    self.cancel(request, call.session)
                self.give_up(request)
