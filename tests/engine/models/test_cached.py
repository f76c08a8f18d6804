"""The check at load of steps over a past: a model that is not exact there serves no sessions."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from djinn_zmq.engine.models import cached
from djinn_zmq.engine.models.caches import Account
from djinn_zmq.engine.models.loading import ServedModel
from djinn_zmq.engine.models.stepping import Stepper
from djinn_zmq.engine.state.keeping import Keeping
from djinn_zmq.errors import NoSessions
from djinn_zmq.wire.messages import ModelInfo
from tests.engine.architectures import VOCAB_SIZE, prompts, tiny_model
from tests.engine.talking import Talk

CPU = torch.device("cpu")


def test_a_model_whose_cached_steps_are_not_exact_serves_no_sessions(keeping: Keeping) -> None:
    model = tiny_model("Llama")
    attention = model.model.layers[1].self_attn
    own_forward, calls = attention.forward, iter(range(10**6))

    def forgetful(*args: Any, **kwargs: Any) -> Any:
        """As a layer that keeps something of its past on itself, not in the cache."""
        out, *rest = own_forward(*args, **kwargs)
        cached = any(kwargs.get(name) is not None for name in ("cache", "past_key_values"))
        return (out + next(calls) if cached else out, *rest)

    attention.forward = forgetful
    stepper = Stepper(model)
    stepper.check(VOCAB_SIZE, CPU)  # plain runs are exact
    why = cached.check(stepper, VOCAB_SIZE, CPU, 64)
    assert why.startswith("its cached steps are not exact: 99 of 99 differ for a prefill")
    info = ModelInfo(
        "Llama", "", "", stepper.num_layers, 32, VOCAB_SIZE, 64, 0, 0, "float32", "cpu", False, "",
        no_sessions=why,
    )  # fmt: skip
    refused = ServedModel(info, stepper, None, CPU)
    with pytest.raises(NoSessions, match='"Llama" serves no sessions: its cached steps are not'):
        Talk(keeping, refused).run(prompts(1))


def test_layers_that_go_on_from_a_past_run_under_what_makes_them_reproducible() -> None:
    """As on a GPU, where PyTorch's first choice of attention over a past is not."""
    entered: list[int] = []

    @contextmanager
    def noted() -> Iterator[None]:
        entered.append(1)
        yield

    stepper = Stepper(tiny_model("Llama"), noted)
    assert cached.check(stepper, VOCAB_SIZE, CPU, 64) == ""
    entered.clear()
    caches, account = stepper.caches, Account()
    ids = prompts(1)
    for past, times in ((None, 0), (caches.blank(0), 0), (caches.blank(64), stepper.num_layers)):
        recording = stepper.record(ids, past)
        entered.clear()
        hidden = recording.embedded.clone()
        for index in range(stepper.num_layers):
            hidden = stepper.step(index, hidden, recording)
        assert len(entered) == times
        entered.clear()
    grown = caches.blank(0)
    stepper.plain(ids, grown)
    assert not entered
    stepper.plain(ids[:, :1], grown)
    assert entered
    assert account.nbytes == 0


def test_a_model_whose_steps_differ_from_run_to_run_is_found_out() -> None:
    stepper = Stepper(tiny_model("Llama"))
    assert cached._check_long(stepper, stepper.caches, VOCAB_SIZE, CPU, 64) == ""
    plain, calls = stepper.plain, iter(range(10**6))
    stepper.plain = lambda *args, **options: plain(*args, **options) + next(calls) % 3
    why = cached._check_long(stepper, stepper.caches, VOCAB_SIZE, CPU, 64)
    assert why == "a step behind 63 tokens came out otherwise 6 times of 8"
