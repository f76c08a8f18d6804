"""Where a session stands, between two forwards or inside one, and what is asked of it there: steps back, prompts behind a
stop, generations that are left."""

import numpy as np
import pytest

import djinn_zmq as djinn
from djinn_zmq.errors import Cancelled, RequestError, StopError
from tests.end_to_end import test_sessions
from tests.end_to_end.test_sessions import FRANCE, bits

session = test_sessions.session


@pytest.mark.parametrize("how", ["back", "in a generation"])
@pytest.mark.parametrize("deeper", [False, True])
def test_a_prompt_behind_a_stop_has_its_own_forward_as_step_0(session, how, deeper):
    """The rest of the forward that it stopped in comes first, and nothing is due in it."""
    first, second = (1, 3) if deeper else (3, 1)
    behind = np.array([138, 39, 5])

    def stand() -> None:
        session.back(start)
        if how == "back":
            session.run([95], save_at=first)
            session.back()
        else:
            list(session.generate([95], 4, stop_at=first, steps=0))

    start = session.run("the capital of france").mark
    session.run([95])
    expected = [token.id for token in session.generate(behind, 4, ends=())]
    said = session.ids.tolist()
    stand()
    stopped = session.generate(behind, 4, ends=(), stop_at=second, steps=0).finish()
    assert session.ids.tolist() == said[:-4] and stopped.layer == second
    saved = {"stopped": stopped.checkpoint}
    assert [token.id for token in stopped.resume()] == expected
    stand()
    saving = session.generate(behind, 4, ends=(), save_at=second, steps=[0]).finish()
    assert saving.ids.tolist() == expected and session.ids.tolist() == said
    (saved["saving"],) = saving.tokens[0].checkpoints.values()
    for point in saved.values():
        assert point.ids.tolist() == [behind.tolist()] and point.before.tolist() == said[:-7]
        assert point.layer == second and point.hidden.shape[:2] == (1, 3)
    stand()
    with pytest.raises(StopError, match="steps 4: this generation has steps 0 to 3"):
        list(session.generate(behind, 4, stop_at=second, steps=4))


def test_a_resume_from_a_generations_checkpoint_gives_the_logits_of_all_its_positions(
    session, tiny
):
    stopped = session.generate(FRANCE, 4, ends=(), stop_at=2, steps=0).finish()
    whole = stopped.checkpoint.resume(logits="all").logits
    assert whole.shape == (1, 5, 208)
    with tiny.session() as other:
        assert bits(whole) == bits(other.run(FRANCE, logits="all").logits)


def test_from_the_embedding_all_layers_are_ahead(session):
    point = session.run([5, 6, 7], stop_at="embedding").checkpoint
    stopped = point.generate(2, ends=(), stop_at=0).finish()
    assert (stopped.step, stopped.layer, len(stopped.tokens)) == (0, 0, 0)
    saving = point.generate(1, ends=(), save_at=[0, 1]).finish()
    assert list(saving.tokens[0].checkpoints) == [0, 1]
    behind = stopped.checkpoint.generate(1, ends=(), save_at=[0, 1]).finish()
    assert list(behind.tokens[0].checkpoints) == [1]


def test_what_a_generation_saved_before_it_was_left_is_what_one_steps_back_to(session):
    session.run([5, 6, 7], save_at=1)
    generation = session.generate([9], 8, save_at=2, ends=())
    for token in generation:
        if token.step == 3:
            break
    last = token.checkpoints[2]
    assert session.checkpoint is last and last.position == 7
    assert session.run([3]).mark.checkpoint is last
    session.back(last)
    assert session.back().position == 6
    taken = [one.id for one in generation.tokens]
    assert session.ids.tolist() == [5, 6, 7, 9, *taken[:2]]


def test_steps_that_never_come_are_refused(session):
    point = session.run([5, 6, 7], stop_at=1).checkpoint
    with pytest.raises(StopError, match="steps 99: this generation has steps 0 to 1"):
        list(point.generate(2, stop_at=2, steps=99))
    with pytest.raises(StopError, match="there is no step 99"):
        list(point.generate(2, stop_at=djinn.Break(2, when=djinn.Step(99))))
    stopped = session.generate(None, 5, stop_at=3, steps=2, ends=()).finish()
    assert (stopped.step, len(stopped.tokens)) == (2, 2)
    with pytest.raises(StopError, match="steps 0: this generation has steps 2 to 3"):
        list(stopped.checkpoint.generate(2, stop_at=3, steps=0))
    assert len(list(stopped.resume())) == 3
    session.run([8])
    with pytest.raises(StopError, match="steps 0: this generation has steps 1 to 2"):
        list(session.generate(None, 3, stop_at=2, steps=0))  # its forward was the run's
    with pytest.raises(StopError, match="steps 0: this generation has no forward to run"):
        list(session.generate(None, 1, save_at=2, steps=[0]))


def test_back_steps_by_checkpoint_and_by_token(session):
    session.run(FRANCE, save_at=[1, 3])
    generation = session.generate(max_new_tokens=4, ends=(), save_at=[0, 2])
    list(generation)
    history = session.checkpoint.history
    assert [(one.position, one.layer) for one in history] == [
        (5, 1), (5, 3), (6, 0), (6, 2), (7, 0), (7, 2), (8, 0), (8, 2),
    ]  # fmt: skip
    assert [one.layer for one in generation.tokens[1].checkpoints.values()] == [0, 2]
    assert session.back() is history[-1] and len(session.ids) == 8
    assert session.back() is history[-2]
    assert session.back(by="token") is history[-3]
    assert session.back(by="token") is history[-5] and session.back() is history[-6]
    history[1].release()
    assert session.back(by="token") is history[0]
    with pytest.raises(RequestError, match="no checkpoint before here"):
        session.back()
    again = session.generate(max_new_tokens=4, ends=())
    assert [token.id for token in again] == generation.ids.tolist()


def test_a_generation_that_is_left_early_stands_behind_its_last_token(session):
    for token in session.generate(FRANCE, max_new_tokens=200, ends=()):
        if token.step == 2:
            break
    assert len(session.ids) == 5 + 3 and session.ids[-1] == token.id
    left = session.run("the").ids
    assert left.shape == (1, 9), "nothing of it had been kept, so it is run again"
    gone = session.generate("a", max_new_tokens=200, ends=())
    next(gone)
    session.run("b")
    with pytest.raises(Cancelled):
        list(gone)


def test_generations_that_are_left_one_behind_the_other_lose_no_token(session):
    start = session.run("the").mark
    whole = [token.id for token in session.generate(FRANCE, 4, ends=())]
    session.back(start)
    for prompt in (FRANCE, None, None):  # each goes on from tokens that are still to be run
        for _ in session.generate(prompt, 50, ends=()):
            break
    assert session.ids.tolist()[-3:] == whole[:3] and len(session.ids) == 1 + 5 + 3
    assert [token.id for token in session.generate(None, 1, ends=())] == whole[3:]


def test_tokens_that_are_still_to_be_run_are_not_lost_by_what_is_asked_next(session, tiny):
    point = session.run(FRANCE, stop_at=2).checkpoint

    def left() -> list[int]:
        """A generation behind its first token, which it went on to from within a forward."""
        for _ in point.generate(20, ends=()):
            break
        return session.ids.tolist()

    ids = left()
    assert session.mark().ids.tolist() == ids and len(ids) == 6
    assert left() == ids and session.run([5, 6]).mark.ids.tolist() == [*ids, 5, 6]
    assert left() == ids and session.back() is point
    left()
    session.rebuild()
    assert session.ids.tolist() == ids
    with tiny.session() as other:
        for foreign in (other.run(FRANCE).mark, other.run("a", stop_at=1).checkpoint):
            with pytest.raises(RequestError, match="of another session|of this session"):
                session.back(foreign)


def test_a_generations_last_token_is_counted_once_by_what_runs_behind_it(session):
    """It has no keys and values yet: it is the first of the next forward's own."""
    for stopped in (False, True):
        generation = session.generate("the", 3, ends=(), stop_at=2 if stopped else None, steps=2)
        if stopped:
            generation = generation.finish().resume()
        generation.finish()
        ids = session.ids.tolist()
        run = session.run([5, 6], save_at=2)
        assert session.ids.tolist() == run.mark.ids.tolist() == [*ids, 5, 6]
        assert run.ids[0].tolist() == [ids[-1], 5, 6]
        point = run.checkpoint
        assert point.before.tolist() == ids[:-1] and point.position == len(ids) + 2
        assert point.resume().mark.ids.tolist() == [*ids, 5, 6]
        session.rebuild()
        assert session.run([7]).mark.ids.tolist() == [*ids, 5, 6, 7]


def test_what_a_generation_began_with_may_be_changed_once_it_is_left(session):
    point = session.run(FRANCE, stop_at=2).checkpoint
    heard = []
    for change in (False, True):
        hidden, vector = point.writable(), np.linspace(-1, 1, 64).astype(np.float32)
        hidden[0, 1] = 0.5
        for _ in point.generate(20, djinn.Add(vector, at=(0, -1)), hidden=hidden, ends=()):
            break
        if change:
            hidden[...] = 3
            vector *= -20
        heard.append(bits(session.run("a").logits))
    assert heard[0] == heard[1]


def test_a_session_stands_where_it_was_moved_last_by_a_token_or_by_a_resume_of_its_checkpoint(
    session,
):
    for token in session.generate(FRANCE, max_new_tokens=200, ends=(), save_at=2):
        branch = token.checkpoints[2].resume(djinn.Scale(0.5))  # the generation goes on beside it
        if token.step == 2:
            break
    assert session.ids.tolist() == branch.mark.ids.tolist() and len(session.ids) == 5 + 2
    for token in session.generate("a", max_new_tokens=200, ends=(), save_at=2):
        if token.step == 1:
            break
        stopped = token.checkpoints[2].resume(stop_at=3)
    assert len(session.ids) == 5 + 2 + 1 + 2 and session.ids[-1] == token.id
    generation = session.generate(max_new_tokens=200, ends=())
    next(generation)
    stopped.checkpoint.resume(stop_at=4)
    assert session.checkpoint.layer == 4


def test_a_checkpoint_of_each_step_knows_the_tokens_of_its_forward_and_those_before(tiny):
    prompt = tiny.encode(FRANCE).tolist()
    with tiny.session() as session:
        stopped = session.generate(FRANCE, 3, ends=(), stop_at=2).finish()  # before any token
        for step in range(3):
            point = stopped.checkpoint
            said = session.ids.tolist()
            assert said == [*point.before, *point.ids[0]] and len(said) == point.position
            assert len(point.ids[0]) == (len(prompt) if step == 0 else 1)
            assert said[: len(prompt)] == prompt
            stopped = stopped.resume().finish()
        assert stopped.reason == "length"
