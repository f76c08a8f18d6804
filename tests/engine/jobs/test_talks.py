"""Conversations with a KV cache, against transformers' own `generate`: bit for bit, wherever stopped.

The reference is a copy of the model made before a Stepper put its stubs in.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


from djinn_zmq.client.indexing import index_of
from djinn_zmq.engine.jobs import talks
from djinn_zmq.engine.models.stepping import same_bits
from djinn_zmq.engine.state.keeping import Keeping
from djinn_zmq.errors import Lost, PromptError, RequestError, RunError, StopError
from djinn_zmq.spans import Stopwatch
from djinn_zmq.wire import edits as wire
from djinn_zmq.wire.messages import IDS_LIMIT, Wanted
from djinn_zmq.wire.stops import Break, HasNaN, Step, Stops, Token
from djinn_zmq.wire.talks import Continue, Sampling
from djinn_zmq.wire.tensors import inline
from tests.engine.architectures import NAMES, PROMPT_LENGTH, prompts
from tests.engine.conftest import keeping_with
from tests.engine.talking import (
    LIMITS,
    NEW,
    STATIC,
    Talk,
    bits,
    both,
    own_cache_name,
    reference,
)

CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def _forget_the_models() -> Iterator[None]:
    yield
    both.cache_clear()


@pytest.fixture(scope="module")
def keeping() -> Iterator[Keeping]:
    with keeping_with(LIMITS) as one:
        yield one


@pytest.fixture(autouse=True)
def _gives_all_back(keeping: Keeping) -> Iterator[None]:
    yield
    keeping.drop(list(keeping.entries))
    keeping.settle()
    assert keeping.pool.used == 0


EVERY = [(name, torch.float32, static) for name in NAMES for static in (0, STATIC)]
FEW = ["Llama", "Gemma2", "Mistral", "GPT2", "Lfm2"]
IN_BFLOAT16 = [(name, torch.bfloat16, 0) for name in FEW]


@pytest.mark.parametrize(("name", "dtype", "static"), EVERY + IN_BFLOAT16)
def test_generation_is_the_models_own_bit_for_bit_and_so_it_is_when_stopped_in_every_step(
    keeping: Keeping, name: str, dtype: Any, static: int
) -> None:
    served, own = both(name, dtype)
    tokens, logits = reference(own, prompts(1), static=static)
    whole = Talk(keeping, served, static).generate(prompts(1))
    assert (whole.tokens, whole.reason) == (tokens, "length")
    assert whole.logits == logits

    talk = Talk(keeping, served, static)
    heard = talk.generate(prompts(1), wanted=Wanted(1, (), "last", 0))
    tokens_so_far, logits_so_far, stops = heard.tokens, heard.logits, 0
    while heard.reason == "stop":
        stops += 1
        layer = 1 + stops % served.info.num_layers
        (kept,) = heard.job.kept
        left = NEW - len(tokens_so_far)
        heard = talk.generate(None, left, checkpoint=kept.id, wanted=Wanted(layer, (), "last", 0))
        tokens_so_far, logits_so_far = tokens_so_far + heard.tokens, logits_so_far + heard.logits
    assert stops > NEW and tokens_so_far == tokens
    assert logits_so_far == logits


SOME = pytest.mark.parametrize("name", FEW)


@pytest.fixture
def talk(keeping: Keeping, name: str) -> Talk:
    return Talk(keeping, both(name, torch.float32)[0])


@SOME
def test_a_conversation_in_pieces_gives_the_logits_of_the_models_own_cached_forwards(
    talk: Talk, name: str
) -> None:
    own = both(name, torch.float32)[1]
    cache: Any = {}
    for ids in (prompts(1), prompts(1, 3), prompts(1, 1), prompts(1, 5)):
        theirs = own(input_ids=ids, use_cache=True, **cache)
        cache = {own_cache_name(own): theirs[own_cache_name(own)]}
        assert same_bits(talk.run(ids, Wanted(None, (), "all", 0)).logits, theirs.logits)


@SOME
def test_branches_of_one_past_do_not_see_each_other(talk: Talk, name: str) -> None:
    talk.run(prompts(1))
    start = talk.branch
    alone = talk.generate(prompts(1, 3), branch=start)
    jobs = [talk.begin(prompts(1, count), branch=start) for count in (3, 2, 3, 4)]
    said: list[list[bytes]] = [[] for _ in jobs]
    turns = [job_turns for _, job_turns in jobs]
    while any(turns):
        for place, one in enumerate(turns):  # a layer of each, in turns
            part = next(one, "over") if one is not None else None
            if part == "over":
                turns[place] = None
            elif part is not None:
                said[place].append(bits(part))
    assert said[0] == said[2] == alone.logits
    assert said[1] != said[0] != said[3]


@SOME
@pytest.mark.parametrize("static", [0, STATIC], ids=["dynamic", "static"])
def test_an_edit_in_the_middle_of_a_generation_holds_for_that_branch_alone(
    keeping: Keeping, name: str, static: int
) -> None:
    talk = Talk(keeping, both(name, torch.float32)[0], static)
    stop = Wanted(2, (), "last", 0)
    whole = talk.generate(prompts(1), branch=0)
    heard = talk.generate(prompts(1), branch=0, wanted=stop, steps=(3,))
    assert heard.tokens == whole.tokens[:3] and heard.reason == "stop"
    (point,) = heard.job.kept
    zero = wire.Add(inline(np.zeros((1, 1, 32), np.float32)), index_of(...))
    scaled = wire.Scale(2.0, index_of(...))
    edited = talk.generate(None, 3, checkpoint=point.id, edits=(scaled,))
    untouched = talk.generate(None, 3, checkpoint=point.id, edits=(zero,))
    assert untouched.logits == whole.logits[3:], "a zero edit changes no bit"
    assert edited.logits != untouched.logits and not set(edited.logits) & set(whole.logits)
    again = talk.generate(None, 3, checkpoint=point.id, edits=(scaled,))
    assert again.logits == edited.logits


@pytest.mark.parametrize("name", ["Llama"])
def test_what_a_generation_goes_on_from_stays_while_others_branch_off_it_and_memory_is_pressed(
    talk: Talk, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = talk.generate(prompts(1), branch=0)
    (point,) = talk.generate(
        prompts(1), branch=0, wanted=Wanted(1, (), "last", 0), steps=(2,)
    ).job.kept
    saves = Wanted(None, (3,), "last", 0)
    heard = talk.drive(*talk.begin(None, 4, checkpoint=point.id, wanted=saves))
    said = [next(heard)]
    talk.resume(talk.kept[-1].id)  # of its first step, all layers executed
    vault = talk.runner._keeping.vault
    monkeypatch.setattr(vault, "limit", 1)
    for _ in vault.shrink():
        pass
    said += heard
    assert [bits(part) for part in said] == whole.logits[2:]
    talk.session.branches.clear()


MANY = [*FEW, "GPTNeoX", "Gemma3Text", "Qwen3", "Phi3", "Bloom", "Falcon", "OPT", "GptOss"]


@pytest.mark.parametrize("name", MANY)
@pytest.mark.parametrize("static", [0, STATIC], ids=["dynamic", "static"])
def test_a_restart_from_a_layer_is_as_if_the_edit_had_been_made_by_the_model_itself(
    keeping: Keeping, name: str, static: int
) -> None:
    """KV-correct: the layers above see the edit in this step's keys and values, and in all later."""
    served, own = both(name, torch.float32)
    talk = Talk(keeping, served, static)
    decoder = own.get_decoder()
    layers = next(c for c in decoder.children() if isinstance(c, torch.nn.ModuleList))
    calls = 0

    def scale_in_step_2(module: Any, args: Any, out: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls != 3:
            return out
        hidden = out[0] if isinstance(out, tuple) else out
        return (hidden * 2, *out[1:]) if isinstance(out, tuple) else hidden * 2

    hook = layers[0].register_forward_hook(scale_in_step_2)
    try:
        tokens, logits = reference(own, prompts(1), static=static)
    finally:
        hook.remove()
    heard = talk.generate(prompts(1), wanted=Wanted(1, (), "last", 0), steps=(2,))
    (point,) = heard.job.kept
    rest = talk.generate(
        None, NEW - 2, checkpoint=point.id, edits=(wire.Scale(2.0, index_of(...)),)
    )
    assert heard.tokens + rest.tokens == tokens
    assert heard.logits + rest.logits == logits


@pytest.mark.parametrize("name", ["Llama"])
@pytest.mark.parametrize(
    ("sampling", "theirs"),
    [
        (Sampling(1.0, 0, 1.0, 7), {"top_k": 0}),
        (Sampling(0.7, 5, 1.0, 8), {"temperature": 0.7, "top_k": 5}),
        (Sampling(1.3, 20, 0.8, 9), {"temperature": 1.3, "top_k": 20, "top_p": 0.8}),
    ],
)
def test_sampled_tokens_are_those_of_generate_with_the_same_seed(
    talk: Talk, name: str, sampling: Sampling, theirs: dict[str, Any]
) -> None:
    own = both(name, torch.float32)[1]
    torch.manual_seed(sampling.seed)
    tokens, _ = reference(own, prompts(1), 12, do_sample=True, **theirs)
    assert talk.generate(prompts(1), 12, branch=0, sampling=sampling).tokens == tokens
    # stopped, and resumed twice: the generator belongs to the branch
    stop = {"wanted": Wanted(1, (), "last", 0), "steps": (5,)}
    heard = talk.generate(prompts(1), 12, branch=0, sampling=sampling, **stop)
    (point,) = heard.job.kept
    same = msgspec_replace(sampling, seed=None)
    for _ in range(2):
        rest = talk.generate(None, 7, checkpoint=point.id, sampling=same)
        assert heard.tokens + rest.tokens == tokens


def msgspec_replace(sampling: Sampling, **changes: Any) -> Sampling:
    import msgspec

    return msgspec.structs.replace(sampling, **changes)


@pytest.mark.parametrize("name", ["Llama"])
def test_logits_that_hold_nan_are_refused_by_name_where_a_token_is_to_be_drawn(talk: Talk) -> None:
    """On a GPU multinomial would assert it on the device, which ends the process and all it holds."""
    sampling = Sampling(1.3, 7, 0.9, 3)
    whole = talk.generate(prompts(1), branch=0, sampling=sampling)
    stop = Wanted(1, (), "last", 0)
    (point,) = talk.generate(
        prompts(1), branch=0, sampling=sampling, wanted=stop, steps=(2,)
    ).job.kept
    lost = (wire.Scale(float("inf"), index_of((0, -1))),)
    with pytest.raises(RunError, match="the logits hold NaN"):
        talk.generate(None, checkpoint=point.id, edits=lost, sampling=Sampling(1.3, 7, 0.9, None))
    again = talk.generate(None, 4, checkpoint=point.id, sampling=Sampling(1.3, 7, 0.9, None))
    assert again.tokens == whole.tokens[2:]


@pytest.mark.parametrize("name", ["Llama", "Gemma2"])
def test_many_branches_hold_one_copy_of_what_is_past(
    talk: Talk, keeping: Keeping, name: str
) -> None:
    def bytes_of_all_tensors() -> int:
        """As the storages say, each counted once."""
        values = [entry.midway.below for entry in keeping.entries.values()]
        pasts = {
            past
            for value in [
                *talk.session.branches.values(),
                *(e.midway.branch for e in keeping.entries.values()),
            ]
            for past in value.past.chain()
        }
        segments = [s for below in values for s in below] + [s for p in pasts for s in p.segments]
        return sum(
            {
                part.untyped_storage().data_ptr(): part.untyped_storage().nbytes()
                for segment in segments
                for part in segment.parts.values()
            }.values()
        )

    talk.run(prompts(1, 40))
    of_one = talk.session.account.nbytes
    stopped = talk.run(prompts(1, 2), Wanted(1, (), "last", 0))
    (point,) = stopped.kept
    begun = talk.session.account.nbytes
    assert begun == bytes_of_all_tensors() and begun - of_one < of_one / 20
    for _ in range(64):
        talk.resume(point.id, Wanted(2, (), "last", 0))
    branched = talk.session.account.nbytes
    assert len(keeping.entries) == 65 and branched == bytes_of_all_tensors()
    assert (branched - begun) / 64 < of_one / 20, "each holds its own two positions, no more"


@pytest.mark.parametrize("name", ["Mistral", "Lfm2"])
@pytest.mark.parametrize("static", [0, STATIC], ids=["dynamic", "static"])
def test_what_is_released_gives_every_byte_back(keeping: Keeping, name: str, static: int) -> None:
    talk = Talk(keeping, both(name, torch.float32)[0], static)
    talk.run(prompts(1))
    start, before = talk.branch, talk.session.account.nbytes
    for _ in range(5):
        heard = talk.generate(prompts(1, 2), branch=start, wanted=Wanted(2, (0, 1), "last", 0))
        talk.resume(heard.job.kept[-1].id)
        keeping.drop([kept.id for kept in talk.kept])
        for number in list(talk.session.branches):
            if number != start:
                del talk.session.branches[number]
        del heard
        assert talk.session.account.nbytes == before


PLACES = ["layers.1.mlp", "layers.1.self_attn.input", "layers.0.self_attn.heads"]
ENDS = ["embedding", "norm", "head", "head.input", ".mlp"]


def stops(*breaks: Break, saves: tuple[str, ...] = ()) -> Wanted:
    return Wanted(Stops(breaks, saves), (), "last", 0)


@pytest.mark.parametrize("static", [0, STATIC], ids=["dynamic", "static"])
@pytest.mark.parametrize("place", [*PLACES, *ENDS])
@pytest.mark.parametrize("name", ["Llama", "Gemma2"])
def test_a_stop_inside_of_every_step_and_a_zero_edit_there_change_no_bit(
    keeping: Keeping, name: str, place: str, static: int
) -> None:
    served = both(name, torch.float32)[0]
    whole = Talk(keeping, served, static).generate(prompts(1))
    talk = Talk(keeping, served, static)
    heard = talk.generate(prompts(1), wanted=stops(Break(place, ())))
    logits, stopped = heard.logits, 0
    while heard.reason == "stop":
        stopped += 1
        point = heard.job.kept[-1]
        assert point.place and point.past == PROMPT_LENGTH + len(logits)
        zero = wire.Add(inline(np.zeros((), np.float32)), index_of(...))
        heard = talk.generate(
            None,
            NEW - len(logits),
            checkpoint=point.id,
            edits=(zero,),
            wanted=stops(Break(place, ())),
        )
        logits += heard.logits
    assert stopped == NEW * (served.info.num_layers if place == ".mlp" else 1)
    assert logits == whole.logits


@pytest.mark.parametrize("name", ["Mistral"])
def test_an_edit_of_a_head_in_one_step_is_as_the_models_own_with_a_hook(
    talk: Talk, name: str
) -> None:
    own = both(name, torch.float32)[1]
    calls = 0

    def silence_in_step_2(module: Any, args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls != 3:
            return None
        mixed = args[0].clone()
        mixed[..., 8:16] = 0
        return (mixed,)

    hook = own.model.layers[1].self_attn.o_proj.register_forward_pre_hook(silence_in_step_2)
    try:
        tokens, logits = reference(own, prompts(1))
    finally:
        hook.remove()
    at = stops(Break("layers.1.self_attn.heads", (((Step(2),),))))
    heard = talk.generate(prompts(1), wanted=at)
    assert len(heard.tokens) == 2 and heard.reason == "stop"
    silenced = wire.Zero(index_of((0, -1, 1)))
    rest = talk.generate(None, NEW - 2, checkpoint=heard.job.kept[-1].id, edits=(silenced,))
    assert heard.tokens + rest.tokens == tokens and heard.logits + rest.logits == logits


@pytest.mark.parametrize("name", ["Llama"])
def test_a_generation_stops_where_a_condition_holds(talk: Talk, name: str) -> None:
    whole = talk.generate(prompts(1), branch=0)
    token = whole.tokens[3]
    heard = talk.generate(prompts(1), branch=0, wanted=stops(Break(1, ((Token(token),),))))
    first = whole.tokens.index(token)
    assert heard.reason == "stop" and heard.tokens == whole.tokens[: first + 1]
    heard = talk.generate(prompts(1), branch=0, wanted=stops(Break("", ((HasNaN(),),))))
    assert heard.reason == "length" and heard.logits == whole.logits
    saved = talk.generate(prompts(1), branch=0, wanted=stops(saves=("layers.2.mlp", "norm")))
    assert saved.logits == whole.logits and len([one for one in talk.kept if one.place]) == 2 * NEW
    point = next(one for one in talk.kept if one.place == "layers.2.mlp")
    assert talk.resume(point.id).logits is not None
    with pytest.raises(StopError, match='"layers.9.mlp" names no module'):
        talk.generate(prompts(1), branch=0, wanted=stops(Break("layers.9.mlp", ())))
    assert talk.generate(prompts(1), branch=0).logits == whole.logits


# ---- what is refused


@pytest.mark.parametrize("name", ["Llama"])
def test_more_tokens_than_the_model_or_its_cache_takes_are_refused(
    talk: Talk, keeping: Keeping, name: str
) -> None:
    talk.run(prompts(1, 60))
    with pytest.raises(PromptError, match=r'65 tokens: "Llama" takes at most 64'):
        talk.run(prompts(1, 5))
    with pytest.raises(PromptError, match='62 tokens and 4 new ones: "Llama" takes at most 64'):
        talk.generate(prompts(1, 2), 4)
    assert talk.generate(prompts(1, 2), 3).reason == "length"
    with pytest.raises(PromptError, match="41 tokens: the session's static cache has 40 places"):
        Talk(keeping, talk.model, STATIC).run(prompts(1, 41))
    with pytest.raises(RequestError, match='cache of 65 positions: "Llama" takes at most 64'):
        Talk(keeping, talk.model, 65).run(prompts(1))
    endless = both("Bloom", torch.float32)[0]
    with pytest.raises(RequestError, match=r"cache of 1000000000000 positions takes .* are free"):
        Talk(keeping, endless, 10**12).generate(prompts(1))


@pytest.mark.parametrize("name", ["Bloom"])
def test_a_generation_has_no_more_tokens_than_its_reply_can_name(
    talk: Talk, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = PROMPT_LENGTH + NEW  # of a model that takes any number
    monkeypatch.setattr(talks, "IDS_LIMIT", limit)
    with pytest.raises(PromptError, match=f"and {NEW + 1} new ones: at most {limit} fit a message"):
        talk.generate(prompts(1), NEW + 1)
    assert len(talk.generate(prompts(1), 0).tokens) == NEW
    with pytest.raises(PromptError, match=f"{limit} tokens and 1 new ones: at most {limit} fit"):
        talk.generate(None, 0)


@pytest.mark.parametrize("name", ["Llama"])
def test_a_text_of_more_tokens_than_fit_a_message_is_refused_as_its_ids_are(talk: Talk) -> None:
    ids = {"input_ids": [1] * (IDS_LIMIT + 1)}
    talk.model = dataclasses.replace(talk.model, tokenizer=lambda text, **_: ids)
    asked = Continue(0, 0, "a long text", None, Wanted(None, (), "last", 0))
    with pytest.raises(
        PromptError, match=f"{IDS_LIMIT + 1} tokens in a batch: at most {IDS_LIMIT}"
    ):
        talk.talker.run(asked, (), talk.session, talk.model, Stopwatch(), shared=False)


@pytest.mark.parametrize("name", ["Llama"])
def test_a_step_that_cannot_come_is_refused_and_one_that_has_passed_is_not(
    talk: Talk, name: str
) -> None:
    there_are = f"this generation has steps 0 to {NEW - 1}"
    with pytest.raises(StopError, match=f"can never hold: there is no step {NEW}: {there_are}"):
        talk.generate(prompts(1), wanted=stops(Break(1, ((Step(NEW),),))))
    with pytest.raises(StopError, match=f"steps 8, 9: {there_are}"):
        talk.generate(prompts(1), wanted=Wanted(1, (), "last", 0), steps=(9, 8))
    at = stops(Break(1, ((Step(2),),)), Break(2, ((Step(2),),)))
    heard = talk.generate(prompts(1), wanted=at)
    tokens = heard.tokens
    for layer in (1, 2):
        (point,) = heard.job.kept
        assert (heard.reason, point.layer, heard.job.step) == ("stop", layer, 2)
        heard = talk.generate(None, NEW - len(tokens), checkpoint=point.id, wanted=at)
        tokens = tokens + heard.tokens
    assert heard.reason == "length" and len(tokens) == NEW


@pytest.mark.parametrize("name", ["Llama"])
def test_what_cannot_be_gone_on_from_is_refused_by_name(
    talk: Talk, keeping: Keeping, name: str
) -> None:
    with pytest.raises(PromptError, match="nothing to generate from"):
        talk.generate()
    with pytest.raises(Lost, match="branch 4d is gone"):
        talk.generate(prompts(1), branch=77)
    with pytest.raises(PromptError, match="2 prompts: a session is one conversation"):
        talk.run(prompts(2))
    (point,) = talk.run(prompts(1), Wanted(1, (), "last", 0)).kept
    with pytest.raises(RequestError, match="only a checkpoint of this session"):
        Talk(keeping, talk.model).generate(checkpoint=point.id)
    keeping.entries[point.id].midway = None  # as a successor of the engine adopts it
    with pytest.raises(
        Lost, match="the keys and values of 11 tokens, which died with their engine"
    ):
        talk.resume(point.id)
