"""Every mistake gets a sentence, loses nothing, and the next request is served."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

import djinn_zmq as djinn
from djinn_zmq import errors
from djinn_zmq.client.calls import Call
from djinn_zmq.wire import messages
from djinn_zmq.wire.ops import Op

FRANCE = "the capital of france is"


@pytest.fixture
def point(tiny):
    return tiny.run(FRANCE, stop_at=2).checkpoint


@pytest.fixture(autouse=True)
def _everything_still_works(tiny):
    """After each mistake of this file: the session and its checkpoints are as they were."""
    before = tiny.run(FRANCE, stop_at=1)
    answer = before.checkpoint.resume().logits.tobytes()
    yield
    assert before.checkpoint.resume().logits.tobytes() == answer


def ask(server, op, meta, session=0):
    """A request as the client's own code would never make it."""

    def operation():
        reply = yield Call(op, meta, session=session)
        return reply.meta

    return server.drive(operation())


def test_an_unknown_model_is_refused_with_the_names_there_are(server):
    with pytest.raises(errors.UnknownModel, match=r'"gpt-9" is no served name \(.*tiny'):
        server.model("gpt-9")


def test_a_hub_id_that_cannot_be_had_is_refused_with_the_reason(server):
    with pytest.raises(errors.UnknownModel, match="nobody/nothing"):
        server.model("nobody/nothing")


def test_a_directory_without_a_model_is_refused(server, tmp_path):
    with pytest.raises(errors.UnknownModel, match=r"has no config\.json"):
        server.model(tmp_path)


def test_layers_that_do_not_exist_are_refused_with_those_that_do(tiny, point):
    for call in (
        lambda: tiny.run(FRANCE, stop_at=31),
        lambda: tiny.run(FRANCE, save_at=[1, 31]),
        lambda: point.resume(stop_at=31),
    ):
        with pytest.raises(
            errors.LayerError, match=r'layer 31 does not exist: "tiny" has 4 layers \(0-4\)'
        ):
            call()
    with pytest.raises(errors.LayerError, match="layer -1 does not exist"):
        tiny.run(FRANCE, stop_at=-1)
    with pytest.raises(errors.LayerError, match="a layer is a whole number"):
        tiny.run(FRANCE, stop_at=2.5)
    with pytest.raises(errors.StopError, match='"2" names no module'):
        tiny.run(FRANCE, stop_at="2")
    with pytest.raises(errors.LayerError, match="stop_at 1 lies behind the checkpoint at layer 2"):
        point.resume(stop_at=1)
    with pytest.raises(errors.LayerError, match="save_at 3 lies behind stop_at 2"):
        tiny.run(FRANCE, stop_at=2, save_at=[3])


def test_a_session_that_is_not_there_is_unknown(server):
    with pytest.raises(errors.UnknownSession, match="does not exist or is not yours"):
        ask(server, Op.PING, messages.Ping(), session=12345)
    with pytest.raises(errors.UnknownSession):
        ask(server, Op.CLOSE, messages.Close(), session=12345)


def test_a_closed_session_is_unknown_and_a_new_one_can_be_opened_and_closing_once_more_does_nothing(
    served,
):
    with served.connect() as server:
        model = server.model("tiny")
        point = model.run(FRANCE, stop_at=2).checkpoint
        model.close()
        with pytest.raises(errors.UnknownSession):
            point.resume()
        again = server.model("tiny")
        assert again.run(FRANCE).top(1)[0].token == "paris"
        model.close()
        assert server.model("tiny") is again
    again.close()


def test_a_checkpoint_of_another_session_cannot_be_resumed_or_released_in_this_one(served, tiny):
    with served.connect() as other:
        theirs = other.model("tiny").run(FRANCE, stop_at=2).checkpoint
        wanted = messages.Wanted(None, (), "last", 0)
        with pytest.raises(errors.RequestError, match="of this session"):
            ask(
                tiny.server,
                Op.RESUME,
                messages.Resume(theirs.id, None, (), wanted),
                session=tiny.session_id,
            )
        with pytest.raises(errors.UnknownCheckpoint):
            ask(tiny.server, Op.RELEASE, messages.Release((theirs.id,)), session=tiny.session_id)
        assert theirs.resume().top(1)[0].token == "paris"


def test_a_checkpoint_that_never_was_is_unknown(tiny):
    wanted = messages.Wanted(None, (), "last", 0)
    with pytest.raises(errors.UnknownCheckpoint, match="does not exist or is not yours"):
        ask(tiny.server, Op.RESUME, messages.Resume(77, None, (), wanted), session=tiny.session_id)


def test_nothing_is_waited_for_any_more_when_one_of_several_requests_fails(tiny):
    def operation():
        pieces = [messages.Read(77 + number, (), 0, 10) for number in range(12)]
        return (yield [Call(Op.READ, piece, session=tiny.session_id) for piece in pieces])

    with pytest.raises(errors.UnknownCheckpoint):
        tiny.server.drive(operation())
    assert tiny.server.connection._calls == {}


def test_wrong_prompts_are_refused(tiny):
    cases = [
        ("", errors.PromptError, "empty prompt"),
        ([], errors.PromptError, "empty prompt"),
        (np.zeros((0, 3), int), errors.PromptError, "empty prompt"),
        ([1, 2, 208], errors.PromptError, 'token id 208: "tiny" has ids 0 to 207'),
        ([-1], errors.PromptError, "token id -1"),
        (np.ones(257, int), errors.PromptError, '257 tokens: "tiny" takes at most 256'),
        ("paris " * 300, errors.PromptError, "300 tokens"),
        ([[1, 2], [3]], errors.PromptError, "different lengths"),
        (["paris", "paris is"], errors.PromptError, "have 1, 2 tokens"),
        ([1.5], errors.PromptError, "a prompt of float64"),
        (np.ones((1, 1, 1), int), errors.PromptError, "shape"),
        (np.ma.array([1, 2], mask=[0, 1]), errors.PromptError, "a masked array of token ids"),
    ]
    for prompt, kind, words in cases:
        with pytest.raises(kind, match=words):
            tiny.run(prompt)


def test_wrong_edits_are_refused_and_say_which(tiny, point):
    cases = [
        (djinn.Add(np.ones(63)), r"edit 0 \(Add\): a value of shape \(63,\)"),
        (djinn.Set(np.ones((5, 64)), at=(0, -1)), r"edit 0 \(Set\)"),
        (djinn.Zero(at=(0, 5)), r"index 5 is out of range on axis 1 .* allowed -5 to 4"),
        (djinn.Zero(at=(0, 0, 0, 0)), "4 axes indexed, hidden has 3"),
        (djinn.Zero(at=(0, slice(3, 3))), "selects nothing"),
        (djinn.Project(np.zeros(64)), "a direction of length zero"),
        (djinn.Scale(1e39), r"edit 0 \(Scale\): a factor of 1e.39: float32 holds"),
        (djinn.Project(np.ones(3)), r"needs \(64,\)"),
        (djinn.Patch(point, at=(0, 1), source_at=(0, slice(1, 3))), "the source's part has shape"),
    ]
    for edit, words in cases:
        with pytest.raises(errors.EditError, match=words):
            point.resume([edit])
    with pytest.raises(errors.EditError, match=r"edit 1 \(Add\)"):
        point.resume([djinn.Scale(2.0), djinn.Add(np.ones(3))])
    with pytest.raises(errors.EditError, match=r"branch 1: edit 0 \(Add\): a value of 1e.39"):
        point.sweep([[], [djinn.Add(1e39)]]).finish()
    with pytest.raises(errors.EditError, match=r"edit 0 \(Add\): a value of 1e.39: bfloat16 holds"):
        tiny.run(FRANCE, edits=djinn.Add(1e39))
    for none in (["zero"], np.zeros(3)):
        with pytest.raises(errors.RequestError, match="is no edit"):
            point.resume(none, stop_at=point.layer)


def test_a_replacement_of_another_shape_or_dtype_is_refused(point):
    whole = np.asarray(point.hidden)
    with pytest.raises(errors.EditError, match=r"hidden is float32, the checkpoint bfloat16"):
        point.resume(hidden=whole.astype(np.float32))
    with pytest.raises(errors.EditError, match=r"hidden has shape \(1, 4, 64\)"):
        point.resume(hidden=whole[:, :4])
    with pytest.raises(errors.EditError, match="dtype"):
        point.resume(hidden=whole.astype(np.complex64))
    with pytest.raises(errors.EditError, match=r"hidden: an array, not <checkpoint .*its \.hidden"):
        point.resume(hidden=point)


def test_wrong_wishes_for_logits_are_refused(tiny):
    for wrong in ("first", 0, -3, 209, True):
        with pytest.raises(errors.RequestError):
            tiny.run(FRANCE, logits=wrong)


NO_NUMBER = ("a", b"1", None, [], {}, object())
NO_WHOLE = (*NO_NUMBER, 2.5, math.nan, True, 2**70, -(2**70), 10**5000)
NO_SECONDS = ("a", b"1", [], {}, object(), 1j, True, 0, -1, math.nan, -math.inf, 10**400)
NO_TEXT = (b"a", None, True, 1, 2.5, [], {}, object())
NO_PATH = (*NO_TEXT, "", "/", "a\0b")
NO_FLAG = ("a", "", 0, 1, None, math.nan, [])

# Every way in for a number, a word, a path: its name, what is wrong there, and the call.
ARGUMENTS = [
    ("timeout_s", NO_SECONDS, lambda here, value: here.connect(timeout_s=value)),
    ("spin_us", (*NO_WHOLE, -1), lambda here, value: here.connect(spin_us=value)),
    ("lane", NO_FLAG, lambda here, value: here.connect(lane=value)),
    ("shared", NO_FLAG, lambda here, value: here.connect(shared=value)),
    ("progress", ("a", 1, []), lambda here, value: here.connect(progress=value)),
    ("key", (b"a", True, 1, [], "", "a\0b"), lambda here, value: here.connect(key=value)),
    ("server_key", ("a", 1), lambda here, value: here.connect(server_key=value)),
    ("endpoint", ("", b"a", 1, [], "ipc://a\0b"), lambda here, value: djinn.connect(value)),
    ("name", NO_TEXT, lambda here, value: here.server.model(value)),
    ("after", (*NO_WHOLE, -1), lambda here, value: here.server.events(value)),
    ("kinds", ("", "x", ["x"], [1], 1, None), lambda here, value: here.server.events(kinds=value)),
    ("session", (*NO_WHOLE, 0, -1), lambda here, value: here.server.runs(value)),
    ("session", (*NO_WHOLE, 0, -1), lambda here, value: here.server.attach(value)),
    ("save_at", (2.5, math.nan, object(), b"a", {}), lambda here, value: here.run(save_at=value)),
    ("logits", (*NO_WHOLE, 0, -1), lambda here, value: here.run(logits=value)),
    ("timeout_s", NO_SECONDS, lambda here, value: here.run(timeout_s=value)),
    ("prompts", ("a", 1, None, [], {}), lambda here, value: here.model.batch(value)),
    ("edits", (1, math.nan, {}), lambda here, value: here.model.batch([FRANCE], edits=value)),
    ("static", (*NO_WHOLE, -1), lambda here, value: here.model.session(static=value)),
    ("layers", (2.5, object(), b"a", {}, [True]), lambda here, value: here.trace(layers=value)),
    ("positions", (2.5, "a", [[]], True), lambda here, value: here.trace(positions=value)),
    ("tokens", (2.5, object(), b"a", True), lambda here, value: here.trace(tokens=value)),
    ("memory", ("a", 2.5, True, 0, -1, 2**70), lambda here, value: here.trace(memory=value)),
    ("text", NO_TEXT, lambda here, value: here.model.tokens(value)),
    ("text", NO_TEXT, lambda here, value: here.model.encode(value)),
    ("ids", ("a", None, 2.5, [1, [2]], True), lambda here, value: here.model.pieces(value)),
    ("path", NO_PATH, lambda here, value: here.model.load_checkpoint(value)),
    ("number", (*NO_WHOLE, 0, -1), lambda here, value: here.model.checkpoint(value)),
    ("expected_s", (*NO_SECONDS, math.inf), lambda here, value: here.model.away(value)),
    ("timeout_s", NO_SECONDS, lambda here, value: here.point.resume(timeout_s=value)),
    ("hidden", ([1, [2]],), lambda here, value: here.point.resume(hidden=value)),
    ("branches", (1, "a", None, {}), lambda here, value: here.point.sweep(value)),
    ("logits", (*NO_WHOLE, 0), lambda here, value: here.point.sweep([[]], logits=value)),
    ("timeout_s", NO_SECONDS, lambda here, value: here.point.sweep([[]], timeout_s=value).all()),
    ("to", (*NO_TEXT, "disk"), lambda here, value: here.point.prefetch(value)),
    ("to", (*NO_TEXT, "device", ""), lambda here, value: here.point.evict(value)),
    ("path", NO_PATH, lambda here, value: here.point.save(value)),
    ("k", NO_WHOLE, lambda here, value: here.point.top(value)),
    ("batch", (*NO_WHOLE, 1, -1), lambda here, value: here.point.top(batch=value)),
    ("positions", (2.5, "a", object()), lambda here, value: here.point.lens(value)),
    ("k", NO_WHOLE, lambda here, value: here.point.lens(k=value)),
    ("lens", (1, None, "a", (1, 2, 3)), lambda here, value: here.point.lens(0)[value]),
    ("layer", NO_WHOLE[3:], lambda here, value: here.point.attention(value)),
    ("index", ([1, [2]],), lambda here, value: here.point.hidden[value]),
    ("k", (*NO_WHOLE, 0), lambda here, value: here.run().top(value)),
    ("batch", (*NO_WHOLE, 1), lambda here, value: here.run().top(batch=value)),
    ("max_new_tokens", ("a", 0, 2**70), lambda here, value: here.generate(max_new_tokens=value)),
    ("seed", NO_WHOLE[3:], lambda here, value: here.generate(seed=value)),
    ("top_p", ("a", math.nan, 10**400, True), lambda here, value: here.generate(top_p=value)),
    ("ends", ("a", 2.5, 2**70), lambda here, value: here.generate(ends=value)),
    ("steps", ("a", 2.5, -1, [], ()), lambda here, value: here.generate(steps=value)),
    ("by", (*NO_TEXT, "x"), lambda here, value: here.talk.back(by=value)),
    ("timeout_s", NO_SECONDS, lambda here, value: here.generate(timeout_s=value).finish()),
    ("Scale", ("2", None, math.nan, 10**400, True), lambda here, value: djinn.Scale(value)),
    ("Skip", NO_WHOLE[1:], lambda here, value: djinn.Skip(value)),
    ("Add", ([1, [2]], "a", math.nan), lambda here, value: djinn.Add(value)),
    ("Step", NO_WHOLE, lambda here, value: djinn.Step(value)),
    ("sent", (2**70,), lambda here, value: here.run(stop_at=value)),
    ("sent", ("half a character: \ud800",), lambda here, value: here.model.run(value)),
    ("sent", (2**70,), lambda here, value: here.run(edits=djinn.Zero(at=value))),
    ("device", ("gpu", "cuda", "", 0, None), lambda here, value: here.local(device=value)),
    ("dtype", ("int8", None, 0), lambda here, value: here.local(dtype=value)),
    ("threads", (0, -1, 1025, 2.5, "2", True), lambda here, value: here.local(threads=value)),
    ("model", NO_TEXT, lambda here, value: here.local(value)),
]


@dataclass
class Here:
    """What a wrong argument is given to."""

    connect: Any
    server: Any
    model: Any
    point: Any
    talk: Any

    def run(self, **options):
        return self.model.run(FRANCE, **options)

    def trace(self, **options):
        return self.model.trace(FRANCE, "the capital of germany is", **options).finish()

    def generate(self, **options):
        return self.talk.generate(FRANCE, **options)

    def local(self, model="tiny", **options):
        with djinn.local(model, **options):
            raise AssertionError("a server was started")


def test_what_no_argument_can_be_is_refused_where_it_is_given_and_names_the_argument(
    served, server, tiny, point, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with tiny.session() as talk:
        here = Here(served.connect, server, tiny, point, talk)
        for name, values, call in ARGUMENTS:
            for value in values:
                with pytest.raises(errors.RequestError) as refused:
                    call(here, value)
                    pytest.fail(f"{name}: {value!r} was taken")
                words = str(refused.value)
                assert type(refused.value) is not errors.ProtocolError, words
                assert name in words and len(words) < 250, words
    assert not list(tmp_path.iterdir())


def test_torchs_bfloat16_is_numpys(tiny, point):
    hidden = torch.tensor(np.asarray(point.hidden, np.float32)).bfloat16().mT.contiguous().mT * 3
    row = hidden[0, -1] + hidden[0, 0]
    for given, same in [
        ({"hidden": hidden}, {"hidden": hidden.float().numpy().astype(point.dtype)}),
        (
            {"edits": djinn.Add(row, at=(0, 1))},
            {"edits": djinn.Add(row.float().numpy(), at=(0, 1))},
        ),
    ]:
        assert point.resume(**given).logits.tobytes() == point.resume(**same).logits.tobytes()
    with torch.no_grad():  # a weight of a model, say, where torch makes an array of it
        weight = torch.nn.Parameter(row)
        assert djinn.Add(weight).array.tobytes() == djinn.Add(row).array.tobytes()


def test_numpys_own_numbers_are_numbers(tiny, point):
    assert tiny.run(FRANCE, stop_at=np.int64(2), timeout_s=np.float32(20)).layer == 2
    assert tiny.run(FRANCE, logits=np.int32(2)).top(np.int64(2))
    assert point.resume(djinn.Scale(np.array(1.0))).logits.tobytes()


def test_a_model_without_a_tokenizer_takes_ids_and_refuses_text_by_name(server, tmp_path):
    import shutil

    folder = tmp_path / "bare"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(f"djinn_zmq/models/tiny/{name}", folder)
    bare = server.model(folder)
    assert not bare.has_tokenizer
    with pytest.raises(errors.NoTokenizer, match="has no tokenizer: send token ids"):
        bare.run(FRANCE)
    run = bare.run([1, 2, 3], stop_at=1).checkpoint.resume()
    assert run.top(1)[0].token == ""
    bare.close()


def test_a_run_that_takes_longer_than_its_timeout_is_cancelled_by_name(tiny):
    ids = np.ones((64, 256), int)
    with pytest.raises(errors.DeadlineExceeded, match="not done within 1 ms"):
        tiny.run(ids, timeout_s=0.001)


def test_a_tier_there_is_not_is_refused_by_name(point):
    assert point.tier == "host"
    with pytest.raises(errors.RequestError, match="no disk tier: serve with --state"):
        point.evict("disk")
    with pytest.raises(errors.RequestError, match="no device tier: serve with --gpu-memory"):
        point.prefetch("device")
    with pytest.raises(errors.RequestError, match='to=\'moon\': "host" or "disk"'):
        point.evict("moon")
    assert point.prefetch() == "host"
    assert point.resume().top(1)[0].token == "paris"


def test_what_is_much_like_what_is_wanted_is_refused_by_what_it_is(tiny, point):
    run = tiny.run(FRANCE)
    grown = torch.ones(64, requires_grad=True)
    half = torch.ones(64, dtype=torch.bfloat16)
    masked = np.ma.array(np.ones(64, np.float32), mask=[1] + [0] * 63)
    for call, error, text in [
        (lambda: point.resume(djinn.Zero), errors.RequestError, "Zero'> is no edit"),
        (lambda: point.resume([djinn.Add]), errors.RequestError, "Add'> is no edit"),
        (lambda: djinn.Patch(run), errors.EditError, "the source is Run: give a checkpoint"),
        (lambda: point.diff(run), errors.RequestError, "diff with Run: give a checkpoint"),
        (lambda: djinn.Add(grown), errors.EditError, "array of this Tensor: .*requires grad"),
        (lambda: djinn.Add(masked), errors.EditError, "Add: value: a masked array, .*give .filled"),
        (lambda: point.resume(hidden=masked), errors.EditError, "hidden: a masked array"),
        (lambda: djinn.Add(grown.bfloat16()), errors.EditError, "this Tensor: .*requires grad"),
        (lambda: point.resume(hidden=half), errors.EditError, r"hidden has shape \(64,\)"),
        (lambda: tiny.run(half), errors.PromptError, "no array of: .*BFloat16"),
    ]:
        with pytest.raises(error, match=text):
            call()


@pytest.mark.parametrize("way", ["lane", "tcp"])
def test_more_than_a_message_carries_is_refused_before_it_is_sent(served, way):
    with djinn.connect(served.endpoint if way == "lane" else served.tcp) as server:
        model = server.model("tiny")
        point = model.run(FRANCE, stop_at=2).checkpoint
        whole = np.zeros(point.shape, np.float64)
        edits = [djinn.Add(whole)] * 65
        with pytest.raises(errors.RequestError, match="65 arrays of more than 2.0 KiB in one req"):
            point.resume(edits)
        for ask_for in (
            lambda: model.run("the " * 600_000),
            lambda: model.encode("the " * 600_000),
            lambda: point.resume([djinn.Scale(1.0, at=(0, -1))] * 100_000),
        ):
            with pytest.raises(errors.RequestError, match="beside its arrays: at most 256.0 KiB"):
                ask_for()
        assert point.resume(edits[:64]).top(1)[0].token == "paris"


def test_a_token_id_past_what_travels_is_named_as_it_was_given(tiny):
    large = np.array([1, 2**63], np.uint64)
    for call in (lambda: tiny.run(large), lambda: tiny.pieces(large)):
        with pytest.raises(errors.PromptError, match="token id 9223372036854775808"):
            call()
    assert tiny.pieces(large[:1]) == tiny.pieces([1])


def test_numpys_own_text_is_text(tiny, point):
    assert tiny.run(np.array(FRANCE)[()]).logits.tobytes() == tiny.run(FRANCE).logits.tobytes()
    assert len(tiny.run([np.str_(FRANCE)]).ids) == 1
    assert tiny.encode(np.str_(FRANCE)).tolist() == tiny.run(FRANCE).ids[0].tolist()
    at = djinn.Break(np.str_("layers.1"), when=djinn.Token(np.str_("france")))
    assert tiny.run(FRANCE, stop_at=at, save_at=np.array(["layers.0"])).layer == 2
    (outcome,) = point.sweep([djinn.Zero()], tokens=np.array(["paris"]))
    assert outcome.token_logits.shape == (1, 1)
    skipped = point.resume(djinn.Skip(np.str_("layers.2"))).logits.tobytes()
    assert skipped == point.resume(djinn.Skip(3)).logits.tobytes()
    assert point.evict(np.str_("host")) == "host"
