"""A debugger on a program whose model is on a GPU: what it sees is there, what it changes is what a hook in the
plain model changes, and else the program's bits are the plain model's."""

import threading
from contextlib import contextmanager

import numpy as np
import pytest
import torch

import djinn_zmq as djinn
from tests.end_to_end.test_attach import WAIT_S, Program, stops_of
from tests.gpu.plain import hands, raw, scaled, seen, steps

pytestmark = pytest.mark.gpu

PLACES = ["embedding", 0, 2, "layers.2.self_attn", "layers.2.mlp", 3, "norm"]
LAST = (0, -1)


@pytest.fixture
def program(watched):
    one = Program(watched.connect(), str(watched.source["brief"]))
    yield one
    one.close()


def silenced(value: torch.Tensor) -> torch.Tensor:
    value = value.clone()
    value[LAST] = 0
    return value


@contextmanager
def busy(watched):
    """While the block lasts another session keeps the device's queue long."""
    over, ids = threading.Event(), watched.ids(64 if watched.device.type == "cuda" else 1, 2000)

    def run() -> None:
        with watched.connect() as server:
            model = server.model(str(watched.source["brief"]))
            while not over.is_set():
                model.run(ids, logits="none")

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_a_run_is_held_with_the_plain_models_bits_at_each_place_and_comes_out_with_them(
    watched, watching, program
):
    ids = watched.ids(1, 700)
    logits = []
    wanted = seen(
        watched.brief,
        PLACES,
        lambda: logits.append(watched.brief(watched.on_device(ids), use_cache=False).logits),
    )
    with watching.attach(program.model.session_id, stop_at=PLACES) as attached:
        answer = program.runs(ids)
        stops = stops_of(attached, len(PLACES))  # reads each as soon as it is told
        done = answer.result(WAIT_S)
    assert [at for at, _ in stops] == PLACES
    for at, bits in stops:
        assert bits == wanted[at], at
    assert raw(done.logits) == raw(logits[0][:, -1])


@pytest.mark.parametrize("at", [2, "layers.1.mlp.input", "layers.3.self_attn.heads"])
def test_what_is_sent_from_one_place_after_another_is_what_each_run_goes_on_with(
    watched, watching, program, at
):
    """While the device is busy: the memory that it was sent in is used again at once."""
    prompts = [watched.ids(1, 600 + place, seed=place) for place in range(3)]
    factors = {600 + place: 0.25 * (1 + place) for place in range(3)}
    wanted = []
    for prompt in prompts:
        with hands(watched.brief, {at: scaled(factors[prompt.shape[1]])}):
            out = watched.brief(watched.on_device(prompt), use_cache=False)
        wanted.append(raw(out.logits[:, -1]))
    with busy(watched), watching.attach(program.model.session_id, stop_at=at) as attached:
        for _ in range(3):
            answer = program.does(program.model.batch, prompts)
            stops = [attached.wait(WAIT_S) for _ in prompts]
            arrays = []
            for stop in stops:
                whole = np.asarray(stop.checkpoint.hidden)
                factor = factors[stop.ids.shape[1]]
                arrays.append((whole.astype(np.float32) * factor).astype(whole.dtype))
            assert min(array.nbytes for array in arrays) >= 64 << 10  # they go by shared memory
            for stop, array in zip(stops, arrays, strict=True):
                stop.continue_(hidden=array)
            assert [raw(run.logits) for run in answer.result(WAIT_S)] == wanted


def test_a_tensor_edited_where_it_stands_on_the_gpu_is_what_the_run_goes_on_with(
    watched, watching, program
):
    if watched.device.type != "cuda":
        pytest.skip("needs CUDA memory")
    ids = watched.ids(1, 700)
    with hands(watched.brief, {2: silenced}):
        wanted = raw(watched.brief(watched.on_device(ids), use_cache=False).logits[:, -1])
    with busy(watched), watching.attach(program.model.session_id, stop_at=2) as attached:
        answer = program.runs(ids)
        stop = attached.wait(WAIT_S)
        tensor = stop.checkpoint.writable_cuda()
        tensor[LAST] = 0
        stop.continue_(hidden=tensor)
        tensor.fill_(7)  # it is the debugger's again
        assert raw(answer.result(WAIT_S).logits) == wanted


@pytest.mark.parametrize("at", [2, "layers.1.self_attn"])
def test_a_generation_behind_a_long_past_is_held_in_each_step_and_edited_in_one(
    watched, watching, program, at
):
    prompt, edit = watched.ids(700), djinn.Scale(-1.0)
    given = watched.on_device(prompt)[None]
    plain = steps(watched.brief, given, 4)
    edited = steps(watched.brief, given, 4, step=2, at=at, change=scaled(-1.0))
    assert plain[:2] == edited[:2] and plain[2] != edited[2]
    model = watching.model(str(watched.source["brief"]))

    def says(session) -> list[bytes]:
        return [raw(one.logits) for one in session.generate(prompt, 4, ends=(), logits="last")]

    for change, wanted in (((), plain), (edit, edited)):
        with program.model.session() as theirs, watching.attach(theirs, stop_at=at) as attached:
            answer = program.does(says, theirs)
            for step in range(4):
                stop = attached.wait(WAIT_S)
                assert stop.step == step and (stop.place or stop.layer) == at
                if step == 2:  # branches of the debugger's own, behind all that is past
                    assert branched(stop.checkpoint, edit) == edited[2:]
                    crowd(watched, model)
                    assert stop.checkpoint.evict("host") == "host"
                    assert branched(stop.checkpoint, edit) == edited[2:]
                stop.continue_(change if step == 2 else ())
            assert answer.result(WAIT_S) == wanted


def branched(point, edit) -> list[bytes]:
    return [raw(one.logits) for one in point.generate(2, [edit], ends=(), logits="last")]


def crowd(watched, model) -> None:
    """More keys and values, and checkpoints, than the device has room for."""
    sessions = [model.session() for _ in range(14)]
    for seed, session in enumerate(sessions):
        session.run(watched.ids(1, 1500, seed=seed), save_at=3, logits="none")
    for session in sessions:
        session.close()
