"""A debugger's holds inside of layers: each layer runs again, and no bit comes out otherwise."""

from collections.abc import Iterator

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from djinn_zmq.engine.attachments import Attachment
from djinn_zmq.engine.jobs.job import EngineSession, Halt
from djinn_zmq.engine.state.keeping import Keeping
from djinn_zmq.errors import DjinnError
from djinn_zmq.wire.codec import NOBODYS
from djinn_zmq.wire.messages import Wanted
from djinn_zmq.wire.stops import Break, Norm
from tests.engine.architectures import prompts
from tests.engine.conftest import keeping_with
from tests.engine.talking import LIMITS, NEW, STATIC, Heard, Talk, both

ANYWHERE = Break("", ((Norm(">=", 0.0),),))
# By architecture a module of every layer that comes behind the attention: by then the layer has written
# to its cache. All 32 architectures pass; these have each kind of cache layer.
BEHIND = {"Llama": ".mlp", "Gemma2": ".mlp", "GPT2": ".mlp", "Lfm2": ".feed_forward"}
CASES = [(name, static) for name in BEHIND for static in (0, STATIC)]


@pytest.fixture(scope="module")
def keeping() -> Iterator[Keeping]:
    with keeping_with(LIMITS) as one:
        yield one
    both.cache_clear()


def attached(talk: Talk, keeping: Keeping, *breaks: Break) -> None:
    def fail(_: Attachment, error: DjinnError) -> None:
        raise error

    debugger = EngineSession(10**9, "me", talk.model.info.name)
    one = Attachment(
        debugger, talk.session, b"", NOBODYS, 0, talk.runner, keeping, fail, breaks=breaks
    )
    talk.session.attached = one


@pytest.mark.parametrize(("name", "static"), CASES)
def test_a_generation_held_everywhere_is_the_same_bit_for_bit(
    keeping: Keeping, name: str, static: int
) -> None:
    model, _ = both(name, torch.float32)
    plain = Talk(keeping, model, static).generate(prompts(1))
    talk = Talk(keeping, model, static)
    attached(talk, keeping, ANYWHERE, Break(BEHIND[name], ()))
    halts, parts = 0, []
    job, turns = talk.begin(prompts(1), wanted=Wanted(None, (), "last", 0))
    for part in turns:
        if isinstance(part, Halt):
            halts += 1
            keeping.drop([kept.id for kept in part.kept])
        elif part is not None:
            parts.append(part)
    heard = Heard(job, parts)
    assert (heard.tokens, heard.logits) == (plain.tokens, plain.logits)
    assert halts == NEW * (2 * model.info.num_layers + 1)
