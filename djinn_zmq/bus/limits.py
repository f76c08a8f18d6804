"""What both ends of the bus set on their socket before it is bound or connected, and ask of it without
pyzmq's Python."""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import zmq
import zmq.backend

from djinn_zmq.settings import Settings

KERNEL_BUFFER = 8 * 1024 * 1024  # bytes; with 1 MiB messages this is raw TCP's speed
HEARTBEAT_MS = 10_000  # libzmq's own, in its io thread: finds a peer whose machine went away
HEARTBEAT_TIMEOUT_MS = 30_000
HANDSHAKE_MS = 5_000
LAST_PORT = 65535

# Plain ints: pyzmq's names are enum members, and `|` on them runs enum's Python on every message.
DONTWAIT, SNDMORE, POLLIN = int(zmq.DONTWAIT), int(zmq.SNDMORE), int(zmq.POLLIN)
MORE_NOW = DONTWAIT | SNDMORE


def apply(socket: "zmq.Socket[bytes]", settings: Settings) -> None:
    """Bound queues, frames and waits; nothing keeps a closed socket alive."""
    for option, value in (
        (zmq.LINGER, 0),
        (zmq.MAXMSGSIZE, settings.frame_limit),
        (zmq.SNDHWM, settings.high_water),
        (zmq.RCVHWM, settings.high_water),
        (zmq.SNDBUF, KERNEL_BUFFER),
        (zmq.RCVBUF, KERNEL_BUFFER),
        (zmq.HANDSHAKE_IVL, HANDSHAKE_MS),
        (zmq.HEARTBEAT_IVL, HEARTBEAT_MS),
        (zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS),
    ):
        socket.setsockopt(option, value)


def end_with(
    owner: object, context: "zmq.Context[zmq.Socket[bytes]]", *sockets: "zmq.Socket[bytes]"
) -> "weakref.finalize[..., Any]":
    """Called, or when *owner* is collected without: closes *sockets*, then *context*, which are its alone.

    A context that is collected waits for its open sockets, for ever where they are collected with it.
    """
    end = weakref.finalize(owner, _end, context, sockets)
    end.atexit = False  # pyzmq knows what to do then
    return end


def _end(context: "zmq.Context[zmq.Socket[bytes]]", sockets: Sequence[Any]) -> None:
    for socket in sockets:
        socket.close(linger=0)
    context.term()


def plain_send(socket: "zmq.Socket[bytes]") -> Callable[..., Any]:
    """The socket's own send(data, flags, copy), without the Python that pyzmq puts before it for
    kinds of sockets we do not use."""
    return zmq.backend.Socket.send.__get__(socket)  # type: ignore[no-any-return]


def has_message(socket: "zmq.Socket[bytes]") -> bool:
    # Not getsockopt(EVENTS): pyzmq makes an enum member of the answer, in Python.
    return bool(zmq.backend.zmq_poll([(socket, POLLIN)], 0))


def port_fits(endpoint: str) -> bool:
    """False for a tcp port beyond the last one: libzmq takes it modulo 65536, without a word."""
    scheme, _, port = endpoint.rpartition(":")
    return not scheme.startswith("tcp") or not port.isdecimal() or int(port) <= LAST_PORT
