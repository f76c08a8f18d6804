"""What a server answers itself: what it keeps in its books, and what its engine is told of it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from djinn_zmq.bus.dealer import Dealer
from djinn_zmq.errors import AccessDenied, ProtocolError, UnknownCheckpoint, UnknownSession
from djinn_zmq.memory import files
from djinn_zmq.server.requests import UPLOADS_LIMIT
from djinn_zmq.server.returned import Returned
from djinn_zmq.wire import codec, messages, states
from djinn_zmq.wire.messages import Flag, Keep, Kept
from djinn_zmq.wire.ops import Op
from djinn_zmq.wire.tensors import Slot, Tensor, inline
from djinn_zmq.wire.tiers import Claim
from tests.server.serving import TINY, Served, keep


def opened(served: Served, client: Dealer) -> int:
    """Its engine has been told of it."""
    session: int = served.ask(client, Op.OPEN, messages.Open("tiny")).session
    engine_told(served)
    return session


def engine_told(served: Served) -> list[tuple[int, Any]]:
    """The ops and metas that the engine has been sent since it was asked last."""
    said = []
    while (frames := served.link.receive()) is not None:
        message = codec.decode(frames[1], frames[2])
        said.append((message.header.op, message.meta))
    return said


def kept_by(served: Served, session: int) -> list[int]:
    return list(served.server.registry.sessions[session].kept)


def test_what_is_released_is_kept_no_more_and_its_engine_is_told(served: Served) -> None:
    client = served.connect(served.ipc)
    session = opened(served, client)
    keep(served, session, range(1, 5))
    served.link.lane.ring()
    served.until(lambda: len(kept_by(served, session)) == 4)
    served.ask(client, Op.RELEASE, messages.Release((1, 1)), session=session)
    assert kept_by(served, session) == [2, 3, 4]
    assert engine_told(served) == [(Op.DROP, messages.Drop((1,)))]
    with pytest.raises(UnknownCheckpoint, match="0x63"):
        served.ask(client, Op.RELEASE, messages.Release((2, 99)), session=session)
    assert kept_by(served, session) == [2, 3, 4] and engine_told(served) == []
    release_one_way(served, client, session, 3, 99)  # a hold, or a branch: the engine knows
    assert kept_by(served, session) == [2, 4]
    drops = [(Op.DROP, messages.Drop((number,))) for number in (3, 99)]
    assert engine_told(served) == drops
    served.engine.state = states.Engine.STARTING
    release_one_way(served, client, session, 4, 99)
    assert kept_by(served, session) == [2]
    held = [codec.decode(frame, buffers).meta for _, frame, buffers in served.engine._held]
    assert held == [messages.Drop((4,))]  # it cannot have any other
    served.engine.state = states.Engine.READY


def release_one_way(served: Served, client: Dealer, session: int, *numbers: int) -> None:
    release = messages.Release(numbers)
    client.send(codec.encode(Op.RELEASE, release, session=session, flags=Flag.ONE_WAY))
    served.ask(client, Op.PING, messages.Ping())


def uploaded(served: Served, client: Dealer, session: int, data: bytes) -> messages.Uploaded:
    client.send(codec.encode(Op.UPLOAD, messages.Upload(len(data)), request=1, session=session))
    one_way = Flag.ONE_WAY
    found: messages.Uploaded = served.ask(
        client, Op.CHUNK, messages.Chunk(0), [data], session=session, flags=one_way
    )
    return found


def test_an_upload_is_its_sessions_until_it_is_released(served: Served) -> None:
    client = served.connect(served.tcp)
    one, other = opened(served, client), opened(served, client)
    upload, more = (uploaded(served, client, one, data) for data in (b"some", b"more"))
    assert upload.id != more.id and isinstance(upload.tensor.where, Slot)
    arenas = served.server.arenas
    assert bytes(arenas.view(upload.tensor.where, 4)) == b"some"
    both = messages.Release((upload.id, more.id))
    with pytest.raises(UnknownCheckpoint):
        served.ask(client, Op.RELEASE, both, session=other)
    assert bytes(arenas.view(upload.tensor.where, 4)) == b"some"
    served.ask(client, Op.RELEASE, both, session=one)
    assert not arenas.staged() and engine_told(served) == []
    with pytest.raises(UnknownCheckpoint):
        served.ask(client, Op.RELEASE, both, session=one)


def test_so_many_uploads_of_one_connection_are_under_way_and_each_has_a_number_of_its_own(
    served: Served,
) -> None:
    client, other = served.connect(served.tcp), served.connect(served.tcp)
    session, others = opened(served, client), opened(served, other)
    meta = messages.Upload(64)
    for request in range(2, UPLOADS_LIMIT + 1):
        client.send(codec.encode(Op.UPLOAD, meta, request=request, session=session))
    again = codec.encode(Op.UPLOAD, meta, request=2, session=session)
    client.send(again)
    with pytest.raises(ProtocolError, match="request 2 is an upload already"):
        served.answer(client)
    client.send(codec.encode(Op.UPLOAD, meta, request=1, session=session))
    client.send(codec.encode(Op.UPLOAD, meta, request=99, session=session))
    with pytest.raises(ProtocolError, match=f"{UPLOADS_LIMIT} uploads are under way: at most"):
        served.answer(client)
    with pytest.raises(UnknownSession):
        served.ask(other, Op.UPLOAD, meta, session=session)
    other.send(codec.encode(Op.UPLOAD, meta, request=1, session=others))
    staged = served.server.arenas.staged
    served.until(lambda: staged() == (UPLOADS_LIMIT + 1) * 4096)
    status = served.ask(other, Op.STATUS, messages.Status())
    assert status.memory.used == staged()
    # Of a client that may come back the sessions are kept, and what it was sending is not.
    peer = served.server.registry.sessions[session].peer
    assert peer is not None
    served.server.requests.forget_peer(peer)
    assert staged() == 4096


def test_what_has_come_back_and_is_claimed_is_its_sessions_and_its_engine_is_told(
    served: Served, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    state.mkdir(0o700)
    client = served.connect(served.ipc)
    session = opened(served, client)
    owner = served.server.registry.sessions[session].owner
    facts = {"format": files.FORMAT, "owner": owner, "layer": "1", **files.facts_of(TINY)}
    arrays = {"hidden": np.ones((1, 2, 4), np.float32), "ids": np.ones((1, 2), np.int64)}
    files.write(files.path_of(state, 7), arrays, facts)
    returned = Returned(str(state))
    served.server.requests._returned = returned
    listed = served.ask(client, Op.CLAIM, Claim(()), session=session)
    assert [kept.id for kept in listed.kept] == [7] and kept_by(served, session) == []
    claimed = served.ask(client, Op.CLAIM, Claim((7,)), session=session)
    assert [kept.id for kept in claimed.kept] == kept_by(served, session) == [7]
    ((op, adopted),) = engine_told(served)
    assert (op, adopted.kept, adopted.ids) == (Op.ADOPT, claimed.kept, claimed.ids[0])
    returned.close()


def test_a_status_counts_checkpoints_and_what_is_in_host_memory(served: Served) -> None:
    client = served.connect(served.ipc)
    session = opened(served, client)
    for number, layer, tiers in ((1, -1, ("host",)), (2, 0, ("host",)), (3, 2, ("disk",))):
        tensor = Tensor("float32", (1, 1, 8), Slot(1, 0, 1))
        kept = Kept(number, session, 1, layer, tensor, tiers=tiers)
        meta = Keep(inline(np.zeros((1, 1), np.int64)), (kept,))
        served.link.send(b"", codec.encode(Op.KEEP, meta, session=session))
    served.until(lambda: len(kept_by(served, session)) == 3)
    status = served.ask(client, Op.STATUS, messages.Status())
    assert (status.memory.checkpoints, status.memory.used) == (2, 64)
    (found,) = status.sessions
    assert (found.checkpoints, found.nbytes, found.yours) == (2, 96, True)
    by_tier = {tier.name: (tier.used, tier.checkpoints) for tier in status.memory.tiers}
    assert by_tier == {"device": (0, 0), "host": (64, 1), "disk": (32, 1)}


def test_who_is_not_the_servers_own_user_does_not_stop_it(served: Served) -> None:
    with pytest.raises(AccessDenied, match="only the user who runs the server may stop it"):
        served.ask(served.connect(served.tcp), Op.STOP, messages.Stop())
    assert not served.server._stops
    stopping = served.ask(served.connect(served.ipc), Op.STOP, messages.Stop())
    assert served.server._stops == 1 and stopping.within_s == 0.0  # there is nothing to write
