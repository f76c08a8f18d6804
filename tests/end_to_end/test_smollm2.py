"""The main job on a real model, where `djinn pull smollm2` has brought it."""

import pytest

import djinn_zmq as djinn
from djinn_zmq.settings import models_dir

pytestmark = pytest.mark.skipif(
    not (models_dir() / "smollm2").is_dir(), reason="needs 'djinn pull smollm2'"
)

FRANCE, GERMANY = "The capital of France is", "The capital of Germany is"


@pytest.fixture(scope="module")
def smollm2(served):
    with served.connect() as server:
        yield server.model("smollm2")


def test_it_knows_the_capital_of_france(smollm2):
    assert smollm2.num_layers == 30
    top = smollm2.run(FRANCE).top(1)[0]
    assert top.token == " Paris"
    assert top.probability == pytest.approx(0.77, abs=0.02)


def test_unedited_resumes_equal_the_uninterrupted_run_at_every_layer(smollm2):
    whole = smollm2.run(FRANCE, save_at=range(31))
    for layer, point in whole.checkpoints.items():
        assert point.resume().logits.tobytes() == whole.logits.tobytes(), layer


def test_germanys_residual_flips_the_answer_early_at_the_subject_and_late_at_the_last_token(
    smollm2,
):
    subject = smollm2.tokens(FRANCE).index(" France")
    here = smollm2.run(FRANCE, save_at=range(31)).checkpoints
    there = smollm2.run(GERMANY, save_at=range(31)).checkpoints

    def answers(position: int) -> list[str]:
        return [
            here[layer].resume([djinn.Patch(there[layer], at=(0, position))]).top(1)[0].token
            for layer in range(31)
        ]

    assert answers(subject) == [" Berlin"] * 24 + [" Paris"] * 7
    assert answers(-1) == [" Paris"] * 24 + [" Berlin"] * 7
