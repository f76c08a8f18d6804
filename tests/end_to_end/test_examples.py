"""Every example runs on the embedded model and shows what it says it shows."""

import re
import runpy
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

import djinn_zmq as djinn

pytest.importorskip("matplotlib")

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def run(served, tmp_path, monkeypatch, capsys) -> Callable[..., str]:
    """Run an example in a directory of its own, as python would; gives what it prints."""
    monkeypatch.setenv("DJINN_ENDPOINT", served.endpoint)
    monkeypatch.chdir(tmp_path)

    def run(name: str, *arguments: str) -> str:
        script = str(EXAMPLES / name)
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        runpy.run_path(script, run_name="__main__")
        return capsys.readouterr().out

    return run


def test_the_lens_sees_the_answer_come_up_in_the_last_layers(run) -> None:
    lines = run("logit_lens.py", "the capital of germany is").splitlines()
    assert [line.split()[2] for line in lines if "after 4" in line] == ["berlin"]
    assert lines[-1].split()[2] == "berlin"


def test_steering_turns_the_answer_with_its_strength(run) -> None:
    lines = [line for line in run("steering.py").splitlines() if "×" in line]
    assert "madrid" in lines[0] and "madrid" not in lines[-1]


def test_patching_finds_the_layer_that_moves_the_answer_and_draws_it(run, tmp_path) -> None:
    text = run("activation_patching.py", str(tmp_path))
    shares = [float(word) for line in text.splitlines() for word in line.split()[1:] if "." in word]
    assert min(shares) < 0.01 and max(shares) > 0.99
    assert (tmp_path / "activation_patching.png").read_bytes().startswith(PNG)


def test_the_trace_finds_the_subject_early_and_the_last_token_late(run, tmp_path) -> None:
    rows = run("causal_trace.py").splitlines()[2:-1]
    first, last = ([float(cell) for cell in row.split()[1:]] for row in (rows[0], rows[-1]))
    assert (first[3] > 0.9, first[4] < 0.1) == (last[4] > 0.9, last[3] < 0.1) == (True, True)
    assert (tmp_path / "causal_trace.png").read_bytes().startswith(PNG)


def test_a_program_that_is_attached_to_answers_otherwise_and_then_as_before(
    run, monkeypatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # for the program that it starts
    text = run("attach_to_a_running_program.py")
    said = [line.split()[-1] for line in text.splitlines() if line.endswith(("paris", "berlin"))]
    assert said == ["paris", "paris", "berlin", "paris"] and "held after layer 2" in text


def test_what_the_readme_shows_in_python_is_what_happens(tiny, monkeypatch, capsys) -> None:
    """Its ten lines and its conversation, as they stand there; what is attached to and where it
    connects are others'."""
    monkeypatch.setattr(djinn, "local", lambda name: nullcontext(tiny))
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    ten, conversation = (
        next(block for block in blocks if words in block) for words in ("local(", "session()")
    )
    names: dict[str, Any] = {}
    exec(ten, names)  # noqa: S102  as its reader does
    out = capsys.readouterr().out
    assert out.index("token='berlin'") < out.index("token='paris'") < out.index("compute")
    exec(conversation, {**names, "model": tiny})  # noqa: S102
    out = capsys.readouterr().out
    assert out.startswith(" paris .") and "[' then', ' tom', ' offered']" in out


def test_every_example_is_in_the_list_and_run_here() -> None:
    listed = (EXAMPLES / "README.md").read_text()
    tests = Path(__file__).read_text()
    for example in EXAMPLES.glob("*.py"):
        assert example.name in listed and f'"{example.name}"' in tests
