"""Conversations through real processes: generate, stop in a step, branch, step back, go on."""

import asyncio
import gc
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import transformers

import djinn_zmq as djinn
from djinn_zmq import aio
from djinn_zmq.errors import (
    Busy,
    Cancelled,
    Closed,
    DeadlineExceeded,
    EditError,
    LayerError,
    PromptError,
    RequestError,
    UnknownCheckpoint,
    UnknownSession,
)
from tests.end_to_end.conftest import until

FRANCE, GERMANY = "the capital of france is", "the capital of germany is"
TINY = "djinn_zmq/models/tiny"
WAIT_S = 30.0


def bits(array) -> bytes:
    return np.asarray(array).tobytes()


def said(generation) -> list[tuple[int, bytes]]:
    return [(token.id, bits(token.logits)) for token in generation]


@pytest.fixture(scope="module")
def plain():
    """The same model by itself."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the server's engine: the number of threads shows in the last bit
    yield transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype="auto").eval()
    torch.set_num_threads(threads)


@pytest.fixture
def session(tiny):
    with tiny.session() as session:
        yield session


@pytest.fixture(params=["ipc", "tcp"])
def anywhere(request, served):
    """A session beside the server, and one across TCP."""
    endpoint = served.endpoint if request.param == "ipc" else served.tcp
    with djinn.connect(endpoint) as server, server.model("tiny").session() as session:
        yield session


def test_what_is_sent_and_said_later_cannot_be_written_into(session):
    run = session.run(FRANCE, save_at=[2])
    before = run.top(1)
    for shown in (run.ids, run.checkpoint.ids, session.mark().ids, run.logits):
        with pytest.raises(ValueError, match="read-only"):
            shown[...] = 0
    assert run.top(1) == before


def test_a_finished_generation_is_what_it_came_to_itself(session):
    generation = session.generate(FRANCE, 2, ends=())
    assert generation.finish() is generation
    assert repr(generation) == "<generation of 2 tokens, over: length>"


def test_it_generates_what_the_model_does_by_itself(anywhere, plain):
    generation = anywhere.generate(FRANCE, max_new_tokens=12, ends=(), logits="last")
    heard = said(generation)
    prompt = torch.tensor(anywhere.ids[:-12])[None]
    with torch.inference_mode():
        out = plain.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=12,
            eos_token_id=None, output_logits=True, return_dict_in_generate=True, pad_token_id=0,
        )  # fmt: skip
    assert [number for number, _ in heard] == out.sequences[0, prompt.shape[1] :].tolist()
    assert [logits for _, logits in heard] == [
        one.to(torch.bfloat16).view(torch.int16).numpy().tobytes() for one in out.logits
    ]
    assert (generation.reason, generation.step) == ("length", 12)


def test_tokens_come_as_text_with_their_probability_and_rivals(session):
    generation = session.generate(FRANCE, max_new_tokens=9, logits=3)
    first = next(generation)
    assert (first.text, first.step) == (" paris", 0)
    assert first.top[0].token == "paris"
    assert first.probability == pytest.approx(first.top[0].probability)
    assert first.logits is None
    rest = list(generation)
    assert [token.step for token in rest] == list(range(1, len(rest) + 1))
    assert generation.reason == "end" and generation.text.startswith(" paris .")
    assert session.ids[-1] == rest[-1].id


def test_a_generation_stopped_in_every_step_is_bit_for_bit_the_one_that_was_not(anywhere):
    start = anywhere.run(FRANCE).mark
    whole = said(anywhere.generate(GERMANY, 6, ends=(), logits="last"))
    anywhere.back(start)
    generation = anywhere.generate(GERMANY, 6, ends=(), logits="last", stop_at=2)
    heard, stops = said(generation), 0
    while generation.stopped:
        point = generation.checkpoint
        assert (point.layer, generation.layer, generation.step) == (2, 2, stops)
        stops += 1
        generation = generation.resume(djinn.Add(np.zeros(64, np.float32)))  # which changes no bit
        heard += said(generation)
    assert stops == 6 and heard == whole
    assert len(anywhere.checkpoint.history) == 6


def test_a_stop_in_a_named_step_has_branches_that_do_not_see_each_other(session):
    stopped = session.generate(FRANCE, 6, ends=(), stop_at=3, steps=2)
    assert len(list(stopped)) == 2 and stopped.stopped
    assert stopped.checkpoint.position == len(session.ids) == 7
    ids = []
    for edits in ([], [djinn.Scale(0.0)], []):
        stopped.resume(edits).finish()
        ids.append(session.ids.tolist())
    assert ids[0] == ids[2] != ids[1] and len(ids[0]) == 11


def test_it_stops_inside_a_layer_on_a_condition_and_goes_on_from_there(session, tiny):
    at = djinn.Break("layers.2.mlp", when=djinn.Step(2))
    stopped = session.generate(FRANCE, 5, ends=(), logits="last", stop_at=at)
    heard = said(stopped)
    assert len(heard) == 2 and stopped.checkpoint.place == "layers.2.mlp"
    rest = said(stopped.resume(djinn.Add(np.zeros(64))))
    silenced = said(stopped.resume(djinn.Zero()))
    assert session.back(by="token") is stopped.checkpoint
    with tiny.session() as other:
        assert said(other.generate(FRANCE, 5, ends=(), logits="last")) == heard + rest
    assert silenced[0] != rest[0]


def test_a_checkpoint_resumed_is_gone_on_from_and_patched_from_another_session(session, tiny):
    point = session.run(FRANCE, stop_at=1).checkpoint
    with tiny.session() as other:
        germany = other.run(GERMANY, stop_at=1).checkpoint
        done = point.resume(djinn.Patch(germany, at=(0, 3)))
    assert done.top(1)[0].token == "berlin"
    assert next(session.generate(max_new_tokens=1)).text == " berlin"
    session.back(point)
    assert next(session.generate(max_new_tokens=1)).text == " paris"
    assert next(point.generate(1, djinn.Zero())).text != " paris"


@pytest.mark.parametrize("where", ["ipc", "tcp"])
def test_a_reader_that_takes_its_time_stops_its_own_generation_and_nobody_else(served, where):
    endpoint = served.endpoint if where == "ipc" else served.tcp
    with djinn.connect(endpoint) as server:
        tiny = server.model("tiny")
        with tiny.session() as slow, tiny.session() as other:
            generation = slow.generate("the", 200, ends=())
            next(generation)
            limit = time.monotonic() + WAIT_S
            while tiny.ping() != "idle":  # paused: as many as it has room for are on the way
                assert time.monotonic() < limit
            assert len(list(other.generate("the", 30, ends=()))) == 30
            assert [token.step for token in generation] == list(range(1, 200))


def test_two_sessions_generating_and_stopping_at_once_say_what_each_says_alone(tiny):
    def talk(session, prompt):
        """Yields after everything it is told."""
        generation = session.generate(prompt, 5, ends=(), logits="last", stop_at=2, steps=[0, 3])
        while True:
            yield from said_one_by_one(generation)
            if not generation.stopped:
                return
            generation = generation.resume()

    def said_one_by_one(generation):
        for token in generation:
            yield token.id, bits(token.logits)

    alone = []
    for prompt in (FRANCE, GERMANY):
        with tiny.session() as session:
            alone.append(list(talk(session, prompt)))
    with tiny.session() as one, tiny.session() as other:
        together = list(zip(talk(one, FRANCE), talk(other, GERMANY), strict=True))
    assert [list(each) for each in zip(*together, strict=True)] == alone


def test_four_clients_generating_and_stopping_at_once_say_what_each_says_alone(served):
    def talk(prompt: str) -> list[tuple[int, bytes]]:
        with served.connect() as server, server.model("tiny").session() as session:
            heard = []
            for _ in range(3):
                generation = session.generate(prompt, 5, ends=(), logits="last", stop_at=2)
                heard += said(generation)
                while generation.stopped:
                    generation = generation.resume()
                    heard += said(generation)
            return heard

    prompts = [FRANCE, GERMANY, " ann and tom went out .", "the"]
    alone = [talk(prompt) for prompt in prompts]
    with ThreadPoolExecutor() as threads:
        assert list(threads.map(talk, prompts)) == alone
    assert len({tuple(heard) for heard in alone}) == 4


def test_a_stop_in_a_conversation_is_swept_and_its_attention_reaches_back(session):
    session.run(FRANCE)
    stopped = session.generate(" .", 5, ends=(), stop_at=2, steps=2)
    stopped.finish()
    point = stopped.checkpoint
    branches = [[], djinn.Zero(), [djinn.Scale(0.5)]]
    outcomes = point.sweep(branches).all()
    for outcome, edits in zip(outcomes, branches, strict=True):
        alone = point.resume(edits).logits.astype(np.float32)
        apart = np.abs(outcome.logits.astype(np.float32) - alone).max()
        assert apart <= 2.0**-7 * np.abs(alone).max()  # bfloat16
    weights = point.attention(4).astype(np.float32)
    assert weights.shape == (1, 4, 1, point.position)
    np.testing.assert_allclose(weights.sum(-1), 1, atol=0.02)


CTRL_C = """
import sys, djinn_zmq as djinn
with djinn.connect(sys.argv[1]) as server, server.model("tiny").session() as session:
    start = session.run("the").mark
    whole = [token.id for token in session.generate(max_new_tokens=60, ends=())]
    print("ready", flush=True)
    try:
        while True:
            session.back(start)
            for token in session.generate(max_new_tokens=60, ends=()):
                pass
    except KeyboardInterrupt:
        pass
    taken = session.ids[1:].tolist()
    assert taken == whole[: len(taken)], (taken, whole)
    session.back(start)
    again = [token.id for token in session.generate(max_new_tokens=60, ends=())]
    print("the same" if again == whole else again, flush=True)
    sys.stdin.read()
"""


def test_ctrl_c_in_a_generation_ends_it_and_the_session_goes_on(served, tiny):
    for _ in range(2):  # it comes at another moment each time
        with subprocess.Popen(
            [sys.executable, "-c", CTRL_C, served.endpoint],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        ) as process:  # fmt: skip
            assert process.stdout.readline() == "ready\n"
            until(lambda: tiny.ping() == "running", "it generates")
            process.send_signal(signal.SIGINT)
            assert process.stdout.readline() == "the same\n"
            until(lambda: tiny.ping() == "idle", "nothing goes on")
            process.stdin.close()
            assert process.wait(WAIT_S) == 0


def test_sampling_goes_on_from_its_seed_and_a_branch_draws_its_own(session):
    wish = {"max_new_tokens": 12, "temperature": 1.5, "top_k": 50, "ends": ()}
    start = session.run("the").mark
    one = session.generate(seed=5, **wish).finish() and session.ids
    session.back(start)
    first = session.generate(seed=5, stop_at=1, steps=6, **wish)
    list(first)
    rests = [first.resume().finish() and session.ids for _ in range(2)]
    assert all(np.array_equal(rest, one) for rest in rests)
    session.back(start)
    other = session.generate(seed=6, **wish).finish() and session.ids
    assert not np.array_equal(one, other)


def test_what_a_session_holds_is_shown_and_given_back(server, tiny, served):
    with tiny.session() as session:
        session.run(FRANCE)
        mine = next(one for one in server.sessions() if one.id == session.id)
        assert mine.kv == 2 * 4 * 5 * 32 * 2  # keys and values, layers, positions, width, bytes
        shown = subprocess.run(
            [sys.executable, "-m", "djinn_zmq.cli.main", "ps", f"--server={served.endpoint}"],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        assert "KV" in shown and "2.5 KiB" in shown
        start = session.mark()
        for _ in range(2):
            stopped = session.generate(GERMANY, 3, ends=(), stop_at=2)
            stopped.finish()
            stopped.resume().finish()
            stopped.checkpoint.resume(stop_at=3).checkpoint.release()
            session.back(start)
        del stopped
        gc.collect()
        tiny.ping()  # behind the releases of what nobody refers to any more
        assert next(one for one in server.sessions() if one.id == session.id).kv == mine.kv
    assert session.id not in [one.id for one in server.sessions()]


def test_bad_input_is_refused_by_name_and_the_session_goes_on(session, tiny):
    session.run(FRANCE)
    bad = [
        (lambda: session.run([1] * 252), PromptError, r'257 tokens: "tiny" takes at most 256'),
        (lambda: list(session.generate("a", 252)), PromptError, "6 tokens and 252 new ones"),
        (lambda: list(session.generate("a", stop_at=9)), LayerError, "layer 9 does not exist"),
        (lambda: session.generate("a", 0), RequestError, "max_new_tokens=0"),
        (lambda: list(session.generate("a", temperature=-1)), RequestError, "temperature -1"),
        (lambda: list(session.generate("a", top_p=0)), RequestError, "top_p 0.0"),
        (lambda: list(session.generate("a", top_k=10**6)), RequestError, "top_k 1000000: 1 to"),
        (lambda: session.generate("a", logits="all"), RequestError, 'logits="all"'),
        (lambda: session.generate("a", steps=-1), RequestError, "steps=-1"),
        (lambda: session.run(["a", "b"]), PromptError, "2 prompts: a session is one conversation"),
        (lambda: session.run(""), PromptError, "an empty prompt"),
        (lambda: session.run([[9999]]), PromptError, "token id 9999"),
        (lambda: session.back(by="mood"), RequestError, "by='mood'"),
        (lambda: list(session.generate("a", timeout_s=1e-3)), DeadlineExceeded, "within 1 ms"),
        (lambda: tiny.session(static=-1), RequestError, "static=-1"),
        (lambda: tiny.run(FRANCE, stop_at=1).checkpoint.generate(1), RequestError, "no past"),
        (
            lambda: list(session.run("a", stop_at=1).checkpoint.generate(1, djinn.Add([1.0] * 3))),
            EditError, "does not fit",
        ),
    ]  # fmt: skip
    mark = session.mark()
    for act, error, text in bad:
        with pytest.raises(error, match=text):
            act()
    session.back(mark)
    assert next(session.generate(max_new_tokens=1)).text == " paris"


def test_branches_of_a_closed_session_are_gone_by_name(tiny):
    session = tiny.session()
    point = session.run(FRANCE, stop_at=2).checkpoint
    open_one = session.generate("a", 50, ends=())
    next(open_one)
    session.close()
    session.close()
    with pytest.raises(Closed, match="the session is closed"):
        session.run("a")
    with pytest.raises((Closed, Cancelled, UnknownSession)):
        list(open_one)
    with pytest.raises(UnknownSession, match="may have been closed"):
        point.resume()
    with pytest.raises((UnknownCheckpoint, UnknownSession)):
        tiny.run(FRANCE, stop_at=1).checkpoint.resume(djinn.Patch(point))
    assert tiny.run(FRANCE).top(1)[0].token == "paris"


@pytest.mark.parametrize("error", [Busy, KeyboardInterrupt])
def test_a_session_whose_end_could_not_be_said_ends_with_the_next_request(
    served, server, monkeypatch, error
):
    def fails(*_):
        raise error("not now")

    with served.connect() as client:
        model = client.model("tiny")
        session = model.session()
        next(session.generate(FRANCE, 50, ends=()))
        numbers = {model.session_id, session.id}
        with monkeypatch.context() as patch:
            patch.setattr(client.connection, "send", fails)
            for one in (session, model):
                with pytest.raises(error):
                    one.close()
        assert numbers <= {one.id for one in server.sessions()}
        client.ping()
        assert not numbers & {one.id for one in server.sessions()}


@pytest.mark.parametrize("way", ["model", "session", "attach"])
def test_a_session_that_nobody_gets_since_he_was_interrupted_is_closed(
    served, server, tiny, monkeypatch, way
):
    def interrupt(*_):
        raise KeyboardInterrupt

    with served.connect() as client:
        model = client.model("tiny") if way == "session" else None
        before = {one.id for one in server.sessions()}
        opening = {
            "model": lambda: client.model("tiny"),
            "session": lambda: model.session(),
            "attach": lambda: client.attach(tiny.session_id),
        }[way]
        with monkeypatch.context() as patch:
            patch.setattr(client.connection.lanes, "know", interrupt)
            with pytest.raises(KeyboardInterrupt):
                opening()
        client.ping()  # behind what is said of it
        assert {one.id for one in server.sessions()} == before


@pytest.mark.parametrize("late", [False, True])
def test_what_a_generation_saved_where_it_was_interrupted_is_released(
    server, tiny, monkeypatch, late
):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    def kept():
        mine = next(one for one in server.sessions() if one.id == session.id)
        return mine.checkpoints, mine.kv

    with tiny.session() as session:
        start = session.run("the").mark
        before = kept()
        generation = session.generate(FRANCE, 2, ends=(), save_at=[1, 2])
        with monkeypatch.context() as patch:
            if late:  # when it is over: as the mark is made, with the last forward's checkpoints
                patch.setattr("djinn_zmq.client.generation.Mark", interrupt)
            else:
                patch.setattr("djinn_zmq.client.generation.along", interrupt)
            with pytest.raises(KeyboardInterrupt):
                generation.finish()
        assert list(generation) == []
        del generation
        session.back(start)
        gc.collect()
        tiny.ping()  # what nobody refers to any more is said with the next request
        until(lambda: kept() == before, "all of it is released")


def test_the_same_in_asyncio_code(served):
    async def main():
        async with aio.connect(served.endpoint) as server:
            model = await server.model("tiny")
            async with await model.session() as one, await model.session() as other:

                async def talk(session, prompt):
                    generation = session.generate(prompt, 5, ends=(), logits="last", stop_at=2)
                    heard = []
                    while True:
                        async for token in generation:
                            heard.append((token.id, bits(token.logits)))
                        if not generation.stopped:
                            return heard
                        generation = generation.resume()

                both = await asyncio.gather(talk(one, FRANCE), talk(other, GERMANY))
                run = await one.run("a", stop_at=1)
                assert one.back() is not run.checkpoint
                mark = await other.mark()
                assert other.back(mark) is mark.checkpoint
                with pytest.raises(TypeError, match="async for"):
                    next(other.generate("a", 1))
                slow = other.generate("a", 100, ends=())
                await anext(slow)
            with pytest.raises(Closed):
                await one.run("a")
            return both

    together = asyncio.run(main())
    with served.connect() as server:
        alone = []
        for prompt in (FRANCE, GERMANY):
            with server.model("tiny").session() as session:
                alone.append(said(session.generate(prompt, 5, ends=(), logits="last")))
    assert together == alone
