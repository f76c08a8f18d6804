from pathlib import Path

import pytest

from bench.config import ResumeLatency, build, read
from djinn_zmq.errors import RequestError

CONFIGS = Path(__file__).parents[2] / "bench" / "configs"


@pytest.mark.parametrize("name", ["llama-2-13b", "tiny", "small"])
def test_the_files_of_the_resume_experiment_are_read(name):
    found = read(ResumeLatency, CONFIGS / f"{name}.yaml", {})
    assert found.model == name and found.layers and found.per_turn > 1


def test_options_stand_above_the_file():
    found = read(ResumeLatency, CONFIGS / "tiny.yaml", {"max_length": 7, "layers": (2,)})
    assert (found.max_length, found.layers, found.device) == (7, (2,), "cpu")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"layrs": [1]}, 'there is no key "layrs"'),
        ({"layers": [1.5]}, "layers is 1.5: it must be of type int"),
        ({"layers": [-1]}, "a layer is at least 0"),
        ({"max_length": True}, "it must be of type int"),
        ({"max_length": 0}, "max_length is 0: it must be at least 1"),
        ({"edits": ["none", "some"]}, 'edits: "some": allowed are none, row, all'),
        ({"model": None}, "model is None: it must be of type str"),
    ],
)
def test_what_is_wrong_is_named(values, words):
    with pytest.raises(RequestError, match=words.replace("[", r"\[")):
        build(ResumeLatency, values)


def test_a_file_that_is_no_mapping_is_refused(tmp_path):
    (tmp_path / "list.yaml").write_text("- a\n- b\n")
    with pytest.raises(RequestError, match="holds list"):
        read(ResumeLatency, tmp_path / "list.yaml", {})
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    with pytest.raises(RequestError, match="is no YAML"):
        read(ResumeLatency, tmp_path / "broken.yaml", {})
