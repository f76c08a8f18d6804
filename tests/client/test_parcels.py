"""What travels with a request comes back when that is answered, and when it never will be."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

import djinn_zmq as djinn
from djinn_zmq import aio
from djinn_zmq.client import tiers
from djinn_zmq.client.calls import Operation
from djinn_zmq.client.forwards import Asked, forward
from djinn_zmq.client.parcels import Parcel
from djinn_zmq.errors import DeadlineExceeded, Lost
from djinn_zmq.memory import files
from djinn_zmq.wire import codec, messages
from djinn_zmq.wire.messages import Flag
from djinn_zmq.wire.ops import Op
from djinn_zmq.wire.tensors import Slot, Tensor
from tests.client import test_parts
from tests.client.test_parts import IT, Script

script = test_parts.script

IDS = np.zeros((1, 3), np.int64)
ARRAY = np.zeros(3 * 2**20, np.uint8)


def saved(path: Path) -> Path:
    tensors = {"hidden": np.ones((1, 3, 1), np.float32), "ids": IDS}
    files.write(path, tensors, {"format": files.FORMAT, "layer": "1"} | files.facts_of(IT))
    return path


@pytest.fixture
def session() -> Any:
    sharing = SimpleNamespace(lease=None)
    return SimpleNamespace(connection=SimpleNamespace(sharing=sharing), id=7, model=IT, progress=None)  # fmt: skip


@pytest.mark.parametrize("op", [Op.FORWARD, Op.RESTORE])
@pytest.mark.parametrize("error", [Lost("its engine died"), KeyboardInterrupt()])
def test_what_travels_with_a_request_that_fails_comes_back(
    session: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, op: Op, error: BaseException
) -> None:
    back: list[Parcel] = []
    monkeypatch.setattr(Parcel, "settle", lambda parcel: back.append(parcel))
    operation: Operation[Any] = (
        forward(session, Asked(IDS))
        if op == Op.FORWARD
        else tiers.load(session, saved(tmp_path / "point.safetensors"))
    )
    call: Any = next(operation)
    assert call.op == op and not back
    with pytest.raises(type(error)):
        operation.throw(error)
    assert len(back) == 1


class Slow(Script):
    """Says that an upload has come only behind the next ping."""

    upload: tuple[bytes, codec.Header] | None = None

    def _take(self, route: bytes, header: codec.Header, meta: msgspec.Struct) -> None:
        if header.op == Op.UPLOAD:
            self.upload = route, header
        elif header.op == Op.PING and self.upload is not None:
            route, of = self.upload
            came = messages.Uploaded(11, Tensor("uint8", ARRAY.shape, Slot(1, 0, 0)))
            frame = codec.encode(
                Op.UPLOAD, came, flags=Flag.REPLY, request=of.request, session=of.session
            )
            self._router.send(route, frame)
            self.upload = None
        super()._take(route, header, meta)


@pytest.mark.parametrize("awaited", [False, True])
def test_an_upload_that_takes_too_long_is_given_up_and_what_comes_of_it_given_back(
    script: Script, awaited: bool
) -> None:
    script.__class__ = Slow
    late = r"^3\.0 MiB were not uploaded to ipc:.* within 0\.2 s$"

    def upload(server: djinn.Server) -> Operation[Tensor]:
        return Parcel(server.connection, 7, 0.2).place(ARRAY)

    async def main() -> None:
        async with aio.connect(script.endpoint) as server:
            with pytest.raises(DeadlineExceeded, match=late):
                await server.drive(upload(server))
            assert await server.ping() == "scripted"
            assert list(server.connection.leftovers.noted) == [(7, 11)]

    if awaited:
        asyncio.run(main())
        return
    with djinn.connect(script.endpoint) as server:
        with pytest.raises(DeadlineExceeded, match=late):
            server.drive(upload(server))
        assert server.ping() == "scripted"
        assert list(server.connection.leftovers.noted) == [(7, 11)]
