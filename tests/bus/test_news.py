"""Events on their way: who hears what, and what is known of who listens."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from djinn_zmq.bus import keys
from djinn_zmq.bus.keys import Admission
from djinn_zmq.bus.news import TOPIC_LIMIT, Publisher, Scopes, Subscriber
from djinn_zmq.errors import AddressInUse, Lost, StartError
from djinn_zmq.settings import Settings

COUNTED = frozenset({b"", b"run"})
WAIT_MS = 10_000  # never reached where the code is right


class Desk:
    """A publisher, and those who listen to it."""

    def __init__(self, context: Any) -> None:
        self.scopes = Scopes()
        self.changes = 0
        self.publisher = Publisher(context, Settings(), None, self.scopes, COUNTED, self._on_change)
        self.publisher.bind("tcp://127.0.0.1:*")
        self.subscribers: list[Subscriber] = []

    def _on_change(self) -> None:
        self.changes += 1

    def listen(self, *topics: str) -> Subscriber:
        subscriber = Subscriber(self.publisher.endpoint, Settings(), None, topics)
        self.subscribers.append(subscriber)
        self.serve(len(topics) + 1)  # and the one that says that they hold
        return subscriber

    def serve(self, count: int) -> None:
        """Look at *count* subscriptions, or ends of them."""
        while count > 0:
            assert self.publisher.socket.poll(WAIT_MS)
            while self.publisher.serve():
                count -= 1

    def serve_all(self) -> None:
        """What has come, where it comes at once."""
        while self.publisher.serve():
            pass


@pytest.fixture
def desk(context: Any) -> Iterator[Desk]:
    desk = Desk(context)
    yield desk
    for subscriber in desk.subscribers:
        subscriber.close()
    desk.publisher.close()


def test_who_listens_hears_what_is_his_and_nothing_else(desk: Desk) -> None:
    mine, others = desk.scopes.told("me"), desk.scopes.told("another")
    subscriber = desk.listen(f"{mine}/run", "all/run")
    for scope, kind in ((others, "run"), (mine, "stop"), (mine, "run"), ("all", "run")):
        desk.publisher.publish(scope, kind, scope.encode())
    heard: list[tuple[bytes, bytes]] = []
    while len(heard) < 2:
        assert subscriber.wait(WAIT_MS / 1000)
        heard += subscriber.take()
    assert subscriber.holds
    assert [frame for _, frame in heard] == [mine.encode(), b"all"]


def test_who_listens_to_all_kinds_is_not_told_of_others_that_begin_to_listen(desk: Desk) -> None:
    mine = desk.scopes.told("me")
    first = desk.listen(f"{mine}/", "all/")
    desk.listen(f"{mine}/run")
    desk.publisher.publish("all", "engine", b"event")
    heard: list[tuple[bytes, bytes]] = []
    while not heard or heard[-1] != (b"all/engine", b"event"):
        assert first.wait(WAIT_MS / 1000)
        heard += first.take()
    assert len(heard) == 1


def test_who_polls_a_publisher_is_told_that_it_has_sent(desk: Desk) -> None:
    desk.publisher.fd = 7
    desk.publisher.publish("all", "engine", b"event")
    assert desk.publisher.unheard == {7}  # to send may swallow the signal of what has come


def test_a_subscription_that_was_refused_ends_nobody_elses(desk: Desk) -> None:
    mine = desk.scopes.told("me")
    desk.listen(f"{mine}/run")
    stranger = desk.listen("of a server before/run")
    assert desk.publisher.kinds == {b"run"}
    stranger.close()
    desk.serve(2)
    assert desk.publisher.kinds == {b"run"}


@pytest.fixture
def three(desk: Desk, context: Any) -> Iterator[list[Any]]:
    """A stranger, a listener and another, whose messages come in the order in which they are sent."""
    desk.publisher.bind("inproc://desk")
    sockets = [context.socket(kind) for kind in (zmq.XSUB, zmq.SUB, zmq.XSUB)]
    for socket in sockets:
        socket.connect("inproc://desk")
    yield sockets
    for socket in sockets:
        socket.close()


def test_nobody_hears_anothers_events_by_a_message_that_is_no_subscription(
    desk: Desk, three: list[Any]
) -> None:
    stranger, listener, accomplice = three
    mine = desk.scopes.told("me")
    stranger.send(b"this would shift whose subscription is whose")
    listener.setsockopt(zmq.SUBSCRIBE, f"{mine}/run".encode())
    accomplice.send(b"\1all/x")
    desk.serve_all()
    desk.publisher.publish(mine, "run", b"a secret")
    assert not accomplice.poll(0)
    assert desk.publisher.kinds == {b"run"}  # its end will be told
    listener.setsockopt(zmq.SUBSCRIBE, f"{mine}/stop".encode())  # then all is as it was before
    desk.serve_all()
    desk.publisher.publish(mine, "stop", b"")
    assert listener.recv_multipart() == [f"{mine}/stop".encode(), b""]


def test_nobody_ends_anothers_subscription_by_a_message_that_is_none(
    desk: Desk, three: list[Any]
) -> None:
    stranger, listener, accomplice = three
    listener.setsockopt(zmq.SUBSCRIBE, b"all/x")
    accomplice.send(b"\1all/x")
    desk.serve_all()
    stranger.send(b"")
    accomplice.send(b"\0all/x")
    listener.setsockopt(zmq.SUBSCRIBE, b"all/y")
    desk.serve_all()
    desk.publisher.publish("all", "x", b"")
    assert listener.poll(0)


def test_of_topics_that_are_not_counted_however_many_none_is_kept(
    desk: Desk, three: list[Any]
) -> None:
    stranger, *_ = three
    for number in range(100):
        stranger.send(b"\1all/%d" % number)
    stranger.send(b"\1all/")
    desk.serve_all()
    assert desk.publisher._holders == {b"all/": 1}
    assert desk.publisher.kinds == {b""} and desk.changes == 1
    desk.publisher.publish("all", "99", b"")  # made they are
    assert stranger.poll(0)


def test_the_last_of_several_who_listen_ends_it(desk: Desk) -> None:
    first, second = desk.listen("all/run"), desk.listen("all/run")
    first.close()
    desk.serve(2)
    assert desk.publisher.kinds == {b"run"}
    second.close()
    desk.serve(2)
    assert desk.publisher.kinds == set()


def test_a_topic_that_is_too_long_is_not_subscribed_to_and_what_has_ended_is_not_sent(
    desk: Desk, three: list[Any]
) -> None:
    stranger, *_ = three
    longest, longer = "k" * (TOPIC_LIMIT - len("all/")), "l" * (TOPIC_LIMIT - len("all/") + 1)
    for kind in (longest, longer, "x"):
        stranger.send(b"\1all/" + kind.encode())
    stranger.send(b"\0all/x")
    desk.serve_all()
    for kind in (longer, "x", longest):
        desk.publisher.publish("all", kind, b"")
    assert stranger.recv_multipart() == [f"all/{longest}".encode(), b""]


def test_with_keys_nobody_listens_without_one(context: Any, directory: Path) -> None:
    keys.new_pair(directory, "server")
    pair, public = keys.new_pair(directory, "ann")
    keys.allow(directory, public)
    admission = Admission(context, keys.server_keys(directory))
    publisher = Publisher(
        context, Settings(), keys.server_keys(directory), Scopes(), COUNTED, lambda: None
    )
    publisher.bind("tcp://127.0.0.1:*")
    seen_off = publisher.socket.get_monitor_socket(
        zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    )
    mine = keys.client_keys(pair, None)
    subscribers = [
        Subscriber(publisher.endpoint, Settings(), key, ["all/run"]) for key in (None, mine)
    ]
    poller = zmq.Poller()
    for socket in (admission.socket, publisher.socket, seen_off, subscribers[1].socket):
        poller.register(socket, zmq.POLLIN)
    turned_away = False
    while not (turned_away and subscribers[1].holds):
        ready = dict(poller.poll(WAIT_MS))
        assert ready
        admission.answer()
        while publisher.serve():
            pass
        subscribers[1].take()
        if seen_off in ready:
            seen_off.recv_multipart()
            turned_away = True
    assert publisher._holders == {b"all/run": 1}
    publisher.publish("all", "run", b"event")
    assert subscribers[1].wait(WAIT_MS / 1000) and not subscribers[0].wait(0)
    for subscriber in subscribers:
        subscriber.close()
    publisher.socket.disable_monitor()
    seen_off.close()
    publisher.close()
    admission.close()


def test_where_it_cannot_be_published_it_says_so(context: Any, desk: Desk) -> None:
    publisher = Publisher(context, Settings(), None, desk.scopes, COUNTED, lambda: None)
    with pytest.raises(AddressInUse, match="tcp://.* is in use by another process"):
        publisher.bind(desk.publisher.endpoint)
    with pytest.raises(StartError, match=r"cannot bind tcp://192\.0\.2\.1:\*: "):
        publisher.bind("tcp://192.0.2.1:*")
    publisher.close()


def test_what_is_no_event_is_the_loss_of_who_tells_them(context: Any) -> None:
    liar = context.socket(zmq.PUB)
    port = liar.bind_to_random_port("tcp://127.0.0.1")
    subscriber = Subscriber(f"tcp://127.0.0.1:{port}", Settings(), None, ["all/"])
    while not subscriber.wait(0.01):
        liar.send(b"all/run")
    with pytest.raises(Lost, match="what came is no event"):
        subscriber.take()
    subscriber.close()
    liar.close()
