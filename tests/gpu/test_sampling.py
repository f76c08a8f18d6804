"""Drawing tokens on a GPU: those of the library with the same seed; and what must not reach a device's assert."""

import pytest
import torch

import djinn_zmq as djinn
from tests.gpu.plain import steps

pytestmark = pytest.mark.gpu


@pytest.fixture
def model(watched, watching):
    return watching.model(str(watched.source["brief"]))


def test_sampled_tokens_are_those_of_generate_with_the_same_seed(watched, model) -> None:
    prompt, how = watched.ids(600), {"temperature": 1.5, "top_k": 50, "top_p": 0.9}
    given = watched.on_device(prompt)[None]
    torch.manual_seed(11)
    own = watched.brief.generate(given, max_new_tokens=8, do_sample=True, eos_token_id=None, **how)
    with model.session() as session:
        said = [token.id for token in session.generate(prompt, 8, seed=11, ends=(), **how)]
    assert said == own[0, 600:].tolist()


def test_logits_of_nan_are_refused_by_name_and_the_engine_and_all_else_lives_on(
    watched, watching, model
) -> None:
    pid, prompt = watching.status().engines[0].pid, watched.ids(300)
    plain = steps(watched.brief, watched.on_device(prompt)[None], 2)
    with model.session() as session:
        stopped = session.generate(prompt, 2, temperature=1.0, seed=1, stop_at=2, ends=())
        assert list(stopped) == []
        for _ in range(2):
            with pytest.raises(djinn.errors.RunError, match="the logits hold NaN"):
                list(stopped.resume([djinn.Scale(1e38), djinn.Scale(1e38)]))
    with model.session() as session:
        said = session.generate(prompt, 2, ends=(), logits="last")
        assert [token.logits.tobytes() for token in said] == plain
    assert watching.status().engines[0].pid == pid
