"""The main job: stop, look, edit, go on."""

import copy
import gc
import pickle
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import torch
import transformers

import djinn_zmq as djinn
from djinn_zmq.errors import (
    EditError,
    LayerError,
    Lost,
    RequestError,
    SelectionError,
    UnknownCheckpoint,
)
from tests.end_to_end.conftest import until

FRANCE, GERMANY = "the capital of france is", "the capital of germany is"
TINY = "djinn_zmq/models/tiny"


def bits(array: np.ndarray) -> bytes:
    return np.asarray(array).tobytes()


@pytest.fixture(scope="module")
def plain():
    """The same model by itself: ids (batch, positions) → logits, and hidden states by layer."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the server's engine: the number of threads shows in the last bit
    model = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype="auto").eval()

    def run(ids):
        with torch.inference_mode():
            out = model(torch.as_tensor(ids), use_cache=False, output_hidden_states=True)
        logits = out.logits.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return logits, [
            h.view(torch.int16).numpy().view(ml_dtypes.bfloat16) for h in out.hidden_states
        ]

    yield run
    torch.set_num_threads(threads)


def test_an_unedited_resume_equals_the_plain_model_bit_for_bit_at_every_layer(tiny, plain):
    logits, _ = plain(tiny.run(FRANCE).ids)
    for layer in range(tiny.num_layers + 1):
        run = tiny.run(FRANCE, stop_at=layer)
        assert (run.state, run.layer, run.checkpoint.layer) == ("stopped", layer, layer)
        assert bits(run.checkpoint.resume().logits) == bits(logits[:, -1])


def test_what_is_saved_at_each_layer_is_what_the_plain_model_computes_there(tiny, plain):
    run = tiny.run(FRANCE, save_at=range(tiny.num_layers + 1), logits="all")
    logits, hidden = plain(run.ids)
    assert bits(run.logits) == bits(logits)
    for layer in range(tiny.num_layers):  # transformers norms the last one it shows
        assert bits(run.checkpoints[layer].hidden) == bits(hidden[layer])


def test_a_batch_of_prompts_of_one_length_equals_the_plain_models_batch(tiny, plain):
    run = tiny.run([FRANCE, GERMANY, "the capital of spain is"], stop_at=3)
    assert run.checkpoint.shape == (3, 5, 64)
    logits, _ = plain(run.ids)
    done = run.checkpoint.resume(logits="all")
    assert bits(done.logits) == bits(logits)
    assert [done.top(1, batch=b)[0].token for b in range(3)] == ["paris", "berlin", "madrid"]


def test_one_row_of_the_hidden_state_is_the_same_as_that_row_of_all_of_it(tiny):
    hidden = tiny.run(FRANCE, stop_at=2).checkpoint.hidden
    assert (hidden.shape, hidden.dtype, hidden.nbytes) == ((1, 5, 64), ml_dtypes.bfloat16, 640)
    whole = np.asarray(hidden)
    assert whole.dtype == ml_dtypes.bfloat16
    assert bits(hidden[0, -1]) == bits(whole[0, -1])
    assert bits(hidden[:, 1:4:2, ::-3]) == bits(whole[:, 1:4:2, ::-3])
    assert bits(hidden[0, [3, 1]]) == bits(whole[0, [3, 1]])
    assert np.asarray(hidden, np.float32).dtype == np.float32
    with pytest.raises(IndexError, match=r"index 5 is out of range on axis 1"):
        hidden[0, 5]
    with pytest.raises(SelectionError):
        hidden[None]


def test_a_checkpoint_can_be_resumed_any_number_of_times_and_every_branch_is_its_own(tiny):
    point = tiny.run(FRANCE, stop_at=2).checkpoint
    untouched = bits(point.resume().logits)
    edited = point.resume([djinn.Zero(at=(0, 3))])
    assert bits(edited.logits) != untouched
    assert bits(point.resume().logits) == untouched
    assert bits(point.resume([djinn.Zero(at=(0, 3))]).logits) == bits(edited.logits)


def test_a_branch_can_stop_again_and_go_on(tiny):
    whole = tiny.run(FRANCE)
    point = tiny.run(FRANCE, stop_at=1).checkpoint
    later = point.resume(stop_at=3, save_at=[2])
    assert sorted(later.checkpoints) == [2, 3]
    assert bits(later.checkpoints[2].resume().logits) == bits(whole.logits)
    assert bits(later.checkpoint.resume().logits) == bits(whole.logits)


def test_a_resume_that_stops_where_it_begins_is_another_checkpoint_of_the_same_bytes(tiny, server):
    first = tiny.run(FRANCE, stop_at=2).checkpoint
    whole, used = first.resume().logits, server.status().memory.used
    run = first.resume(stop_at=2, logits="none")
    assert (run.state, run.layer, dict(run.spans).keys() >= {"restore"}) == ("stopped", 2, True)
    second = run.checkpoint
    assert second.id != first.id
    assert server.status().memory.used == used + second.nbytes  # counted for each, kept once
    first.release()
    assert bits(second.hidden) == bits(tiny.run(FRANCE, stop_at=2).checkpoint.hidden)
    assert bits(second.resume().logits) == bits(whole)
    with pytest.raises(UnknownCheckpoint):
        first.resume(stop_at=2, logits="none")


def test_an_activation_replaced_outright_is_what_the_rest_of_the_model_sees(tiny):
    france = tiny.run(FRANCE, stop_at=2).checkpoint
    germany = tiny.run(GERMANY, stop_at=2).checkpoint
    done = france.resume(hidden=np.asarray(germany.hidden))
    assert bits(done.logits) == bits(germany.resume().logits)
    assert done.top(1)[0].token == "berlin"


def test_the_subjects_residual_from_another_prompt_flips_the_answer_early_and_not_late(tiny):
    here = tiny.run(FRANCE, save_at=range(5)).checkpoints
    there = tiny.run(GERMANY, save_at=range(5)).checkpoints
    answers = [
        here[layer].resume([djinn.Patch(there[layer], at=(0, 3))]).top(1)[0].token
        for layer in range(5)
    ]
    assert answers[0] == "berlin"
    assert answers[-1] == "paris"


def test_edits_do_what_numpy_would(tiny):
    point = tiny.run(FRANCE, stop_at=2).checkpoint
    whole = np.asarray(point.hidden).astype(np.float32)
    vector = np.linspace(-1, 1, 64).astype(np.float32)
    wanted = whole.copy()
    wanted[0, -1] += vector
    wanted = wanted.astype(ml_dtypes.bfloat16)
    wanted[0, 1:3] = (wanted[0, 1:3].astype(np.float32) * 0.5).astype(ml_dtypes.bfloat16)
    done = point.resume([djinn.Add(vector, at=(0, -1)), djinn.Scale(0.5, at=(0, slice(1, 3)))])
    assert bits(done.logits) == bits(point.resume(hidden=wanted).logits)
    saved = point.resume(
        [djinn.Add(vector, at=(0, -1)), djinn.Scale(0.5, at=(0, slice(1, 3)))], stop_at=2
    ).checkpoint
    assert bits(saved.hidden) == bits(wanted)


def test_an_edit_that_adds_nothing_changes_no_bit(tiny):
    point = tiny.run(FRANCE, stop_at=2).checkpoint
    whole = np.asarray(point.hidden)
    nothing = [
        djinn.Add(np.zeros(64)),
        djinn.Scale(1.0),
        djinn.Lerp(np.ones(64), 0.0),
        djinn.Set(whole),
        djinn.Patch(point),
    ]
    for edit in nothing:
        assert bits(point.resume([edit], stop_at=2).checkpoint.hidden) == bits(whole)


def test_top_is_the_softmax_of_the_logits_and_top_k_alone_gives_the_same(tiny):
    run = tiny.run(FRANCE)
    top = run.top(5)
    assert top[0].token == "paris"
    logits = run.logits[0].astype(np.float64)
    shares = np.exp(logits - logits.max())
    assert top[0].probability == pytest.approx(shares.max() / shares.sum(), rel=1e-12)
    sent = tiny.run(FRANCE, logits=5)
    assert [(t.id, t.token, t.logit) for t in sent.top(5)] == [
        (t.id, t.token, t.logit) for t in top
    ]
    assert sent.top(2)[1].probability == pytest.approx(top[1].probability, rel=1e-9)
    with pytest.raises(RequestError, match="asked for no logits"):
        _ = sent.logits
    with pytest.raises(RequestError, match="k=6: 1 to 5, as many as the run was asked for"):
        sent.top(6)


def test_token_ids_run_like_the_text_they_come_from(tiny):
    ids = tiny.encode(FRANCE)
    assert tiny.tokens(FRANCE) == ["the", "capital", "of", "france", "is"]
    text = tiny.run(FRANCE)
    for prompt in (ids, ids.tolist(), ids[None], ids.astype(np.int32)):
        assert bits(tiny.run(prompt).logits) == bits(text.logits)


def test_spans_add_up_and_print_as_a_table(tiny):
    point = tiny.run(FRANCE, stop_at=1).checkpoint
    spans = point.resume([djinn.Scale(2.0)]).spans
    names = [name for name, _ in spans]
    assert names[:2] == ["client encode", "wire"]
    assert {"queue", "decode", "restore", "edit", "compute"} <= set(names)
    assert len(set(names)) == len(names)  # each line of the table is another one
    assert spans.total_ns == sum(spans[name] for name in names)
    assert spans["wire"] > 0
    lines = str(spans).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[-1].startswith("total")


def test_a_released_checkpoint_is_unknown_and_its_memory_is_back(tiny, server):
    before = server.status().memory.checkpoints
    point = tiny.run(FRANCE, stop_at=2).checkpoint
    assert server.status().memory.checkpoints == before + 1
    point.release()
    assert server.status().memory.checkpoints == before
    for call in (point.resume, point.norms, point.release, point.evict, lambda: point.tier):
        with pytest.raises(UnknownCheckpoint) as refused:
            call()
        assert str(refused.value) == (
            f"checkpoint {point.id:#x} does not exist or is not yours here: it may have been released, or "
            "lost with an engine that had the only copy"
        )
    with pytest.raises((Lost, UnknownCheckpoint)):
        point.hidden.fetch()
    assert tiny.run(FRANCE).top(1)[0].token == "paris"


def test_a_checkpoint_nobody_refers_to_is_released_by_itself(tiny, server):
    before = server.status().memory.checkpoints
    for _ in range(20):
        tiny.run(FRANCE, save_at=[1, 2])
    gc.collect()
    tiny.ping()  # takes along what is released, past the server
    until(lambda: server.status().memory.checkpoints <= before + 2, "the others are released")


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_what_holds_a_connection_is_not_copied_deeply_and_says_so_without_noise(tiny):
    point = tiny.run(FRANCE, stop_at=2).checkpoint
    with tiny.session() as talk:
        talk.run(FRANCE)
        for held in (point, talk.mark(), tiny):
            for copied in (copy.deepcopy, pickle.dumps):
                with pytest.raises(TypeError, match="stay in their process: .* save"):
                    copied(held)
    gc.collect()
    assert point.kept and point.resume().state == "finished"


def test_the_end_of_a_copy_of_a_checkpoint_releases_nothing(tiny):
    point = tiny.run(FRANCE, stop_at=2).checkpoint
    copy.copy(point)
    tiny.ping()
    assert point.kept and point.resume().top(1)[0].token == "paris"


def test_a_program_ends_in_silence_with_what_it_still_keeps(served):
    program = (
        "import sys, djinn_zmq as djinn; model = djinn.connect(sys.argv[1]).model('tiny');"
        "run = model.run('the capital of france is', stop_at=2); run.itself = run"
    )
    command = [sys.executable, "-c", program, served.endpoint]
    ended = subprocess.run(command, check=True, capture_output=True, text=True)
    assert (ended.stdout, ended.stderr) == ("", "")


def test_the_hidden_state_read_while_its_checkpoint_goes_out_of_scope_is_still_good(tiny):
    hidden = tiny.run(FRANCE, stop_at=2).checkpoint.hidden
    gc.collect()
    tiny.ping()
    assert np.asarray(hidden).shape == (1, 5, 64)


def test_a_stopped_run_has_no_logits_and_says_why(tiny):
    run = tiny.run(FRANCE, stop_at=2)
    with pytest.raises(RequestError, match="stopped after layer 2: resume"):
        _ = run.logits
    finished = tiny.run(FRANCE, logits="none")
    with pytest.raises(LayerError, match="kept no checkpoint"):
        _ = finished.checkpoint


def test_a_first_stop_and_resume_import_nothing_more_than_the_client_did(served):
    program = (
        "import sys, djinn_zmq as djinn; before = {*sys.modules};"
        "server = djinn.connect(sys.argv[1]); model = server.model('tiny');"
        "run = model.run('the capital of france is', stop_at=2, timeout_s=60);"
        "run.checkpoint.resume(djinn.Scale(0.5)).top(3); run.checkpoint.hidden[0, -1]; model.ping();"
        "server.close(); print({*sys.modules} - before)"
    )
    command = [sys.executable, "-c", program, served.endpoint]
    shown = subprocess.run(command, check=True, capture_output=True, text=True)
    assert shown.stdout == "set()\n"


def test_edits_are_checked_before_anything_travels(tiny):
    for wrong in (
        lambda: djinn.Add(np.array([1.0, np.nan])),
        lambda: djinn.Set(np.array(["a"])),
        lambda: djinn.Scale(float("inf")),
        lambda: djinn.Add(np.ones(3, complex)),
        lambda: djinn.Patch("x"),
    ):
        with pytest.raises(EditError):
            wrong()
