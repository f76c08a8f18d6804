"""What travels with a generation comes back however that ends. The server is a script."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

import djinn_zmq as djinn
from djinn_zmq.client.calls import Operation
from djinn_zmq.client.generation import GeneratedToken, Generation
from djinn_zmq.client.parcels import Parcel
from djinn_zmq.client.talk import Standing, wish_of
from djinn_zmq.errors import Busy, LayerError, PromptError
from djinn_zmq.wire import codec
from djinn_zmq.wire.ops import Op
from djinn_zmq.wire.tensors import Tensor
from tests.client import test_parts
from tests.client.test_parts import IT, Script

script = test_parts.script


class Refusing(Script):
    """Refuses every generation, unless it is to be silent."""

    def _take(self, route: bytes, header: codec.Header, meta: msgspec.Struct) -> None:
        if header.op == Op.GENERATE and self.last != "silence":
            self._router.send(route, codec.failure(header, PromptError("too long")))
        else:
            super()._take(route, header, meta)


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Parcel]]:
    found: list[Parcel] = []
    monkeypatch.setattr(Parcel, "settle", lambda parcel: found.append(parcel))
    yield found


def generation_on(server: djinn.Server) -> Generation:
    def placed(prompt: Any, pending: Any, parcel: Parcel) -> Operation[tuple[str, Tensor | None]]:
        return "", (yield from parcel.place(np.zeros((1, 3), np.int64)))

    session = SimpleNamespace(
        connection=server.connection,
        drive=server.drive,
        id=7,
        static=0,
        standing=Standing(),
        says=lambda said: None,
        placed=placed,
    )
    return Generation(session, "prompt", wish_of(IT, 4))


@pytest.mark.parametrize(
    ("script", "how"),
    [((0, "reply"), "refused"), ((0, "silence"), "interrupted"), ((0, "silence"), "unsent")],
    indirect=["script"],
)
def test_what_travelled_with_a_generation_that_gave_nothing_comes_back(
    script: Script, settled: list[Parcel], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    def full(*_: object) -> None:
        raise Busy("the way is full")

    script.__class__ = Refusing
    errors = {"refused": PromptError, "interrupted": KeyboardInterrupt, "unsent": Busy}
    with djinn.connect(script.endpoint) as server:
        generation = generation_on(server)
        with monkeypatch.context() as patch:
            if how == "interrupted":
                patch.setattr(server.connection, "_hear", interrupt)
            if how == "unsent":
                patch.setattr(server.connection, "send", full)
            with pytest.raises(errors[how]):
                next(generation)
        assert len(settled) == 1
        generation.close()
        assert list(generation) == [] and len(settled) == 1


def test_its_checkpoint_is_the_last_that_any_of_its_forwards_kept() -> None:
    generation = Generation(SimpleNamespace(), "prompt", wish_of(IT, 4))
    with pytest.raises(LayerError, match="kept no checkpoint"):
        _ = generation.checkpoint
    kept: list[dict[int | str, Any]] = [{1: "a", 2: "b"}, {1: "c", "layers.1": "d"}, {}]
    generation.tokens = [GeneratedToken(7, "", 0, 0.0, None, [], one) for one in kept]
    assert generation.checkpoint == "d"  # type: ignore[comparison-overlap]
    generation.checkpoints = {3: "e"}  # type: ignore[dict-item]
    assert generation.checkpoint == "e"  # type: ignore[comparison-overlap]


@pytest.mark.parametrize("script", [(0, "silence")], indirect=True)
def test_what_travelled_with_a_generation_that_is_left_unheard_comes_back(
    script: Script, settled: list[Parcel]
) -> None:
    with djinn.connect(script.endpoint) as server:
        generation = generation_on(server)
        next(generation._step())  # it is sent, and waited for
        generation.close()
        assert len(settled) == 1
