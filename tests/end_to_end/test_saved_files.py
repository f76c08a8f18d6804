"""A checkpoint in a file of the user's own: it is loaded again as it was, or refused by name."""

import gc
import os

import numpy as np
import pytest

import djinn_zmq as djinn
from djinn_zmq.client import model as model_room
from djinn_zmq.errors import BadFile, RequestError
from djinn_zmq.memory import files
from tests.end_to_end.conftest import until

FRANCE = "the capital of france is"


def test_a_saved_checkpoint_is_loaded_again_by_another_client(served, tiny, tmp_path):
    point = tiny.run(FRANCE, stop_at=2).checkpoint
    path = point.save(tmp_path / "point.safetensors")
    assert path.stat().st_mode & 0o777 == 0o600
    with djinn.connect(served.tcp) as elsewhere:
        again = elsewhere.model("tiny").load_checkpoint(path)
        assert (again.layer, again.shape) == (2, point.shape)
        assert again.resume().logits.tobytes() == point.resume().logits.tobytes()
        assert again.resume(stop_at=3).ids.tolist() == point.resume(stop_at=3).ids.tolist()


def test_what_a_file_was_made_a_checkpoint_of_is_released_if_nobody_gets_it(
    server, tiny, tmp_path, monkeypatch
):
    def interrupted(*_):
        raise KeyboardInterrupt

    path = tiny.run(FRANCE, stop_at=2).checkpoint.save(tmp_path / "point.safetensors")
    gc.collect()
    tiny.ping()
    before = server.status().memory.checkpoints
    monkeypatch.setattr(model_room, "Checkpoint", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tiny.load_checkpoint(path)
    tiny.ping()
    until(lambda: server.status().memory.checkpoints == before, "it is released")


def test_what_needs_more_than_a_file_holds_is_not_written_and_the_file_there_stays(tiny, tmp_path):
    path = tmp_path / "point.safetensors"
    path.write_bytes(b"precious")
    with pytest.raises(RequestError, match=r"inside a layer, at layers\.1\.mlp: save one between"):
        tiny.run(FRANCE, stop_at="layers.1.mlp").checkpoint.save(path)
    with tiny.session() as session:
        session.run(FRANCE)
        with pytest.raises(RequestError, match="the keys and values of 6 tokens, which are not"):
            session.run("paris", stop_at=2).checkpoint.save(path)
    assert path.read_bytes() == b"precious"


@pytest.mark.parametrize(
    ("harm", "text"),
    [
        (lambda raw: raw[:100], "is cut short: its header takes"),
        (lambda raw: raw[:-1], "is cut short"),
        (lambda raw: b"\xff" * 8 + raw[8:], "no safetensors file"),
        (lambda raw: raw.replace(b'"tiny"', b'"huge"'), "its header has the checksum"),
        (lambda raw: raw.replace(b'"layer": "2"', b'"layer": "3"'), "its header has the checksum"),
        (lambda raw: raw.replace(b"point-2", b"point-1"), 'format "djinn-checkpoint-1": .*-2" is'),
        (lambda raw: raw[:-1] + bytes([raw[-1] ^ 1]), "is damaged: bytes 0 to 40 of ids"),
    ],
)
def test_a_file_of_something_else_or_a_damaged_one_is_refused_by_name(tiny, tmp_path, harm, text):
    path = tiny.run(FRANCE, stop_at=2).checkpoint.save(tmp_path / "point.safetensors")
    path.write_bytes(harm(path.read_bytes()))
    with pytest.raises(BadFile, match=f"{path}.* ?{text}"):
        tiny.load_checkpoint(path)
    with pytest.raises(BadFile, match="No such file"):
        tiny.load_checkpoint(tmp_path / "nothing")


def test_what_is_no_regular_file_is_neither_written_over_nor_read(tiny, tmp_path):
    """A fifo nobody writes to would be waited for, for ever."""
    point = tiny.run(FRANCE, stop_at=2).checkpoint
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for name, kind in (("pipe", "fifo"), ("link", "symbolic link"), ("", "directory")):
        with pytest.raises(BadFile, match=f"{tmp_path / name} is a {kind}: only"):
            point.save(tmp_path / name)
    assert (tmp_path / "pipe").is_fifo() and (tmp_path / "link").is_symlink()
    for path, kind in ((tmp_path / "pipe", "fifo"), (tmp_path, "directory"), ("/dev/null", "dev")):
        with pytest.raises(BadFile, match=f"{path} is a {kind}.*: only a regular file is read"):
            tiny.load_checkpoint(path)
    (tmp_path / "elsewhere").write_bytes(b"something of before")
    point.save(tmp_path / "elsewhere")
    assert tiny.load_checkpoint(tmp_path / "link").layer == 2


def test_a_checkpoint_of_another_model_or_layer_is_refused_by_name(tiny, tmp_path):
    arrays = {"hidden": np.zeros((1, 2, 64), "float32"), "ids": np.ones((1, 2), np.int64)}
    facts = {"format": files.FORMAT, **files.facts_of(tiny.info)}
    for layer, also, text in (
        ("2", {"model": "huge"}, 'model "huge", not "tiny"'),
        ("9", {}, 'layer 9: "tiny" has layers 0 to 4'),
    ):
        files.write(tmp_path / "one", arrays, facts | also | {"layer": layer})
        with pytest.raises(BadFile, match=text):
            tiny.load_checkpoint(tmp_path / "one")
