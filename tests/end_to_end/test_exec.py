"""`djinn exec`: an unmodified program gives under it what it gives alone."""

import io
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from rich.console import Console

from djinn_zmq.cli.debug import looking, moving
from djinn_zmq.cli.debug.debugger import Debugger
from djinn_zmq.cli.main import main
from tests.end_to_end.conftest import WAIT_S, Running

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

assert looking and moving  # the debugger's words register themselves

TINY = resources.files("djinn_zmq") / "models" / "tiny"
ROOT = Path(__file__).parents[2]
DJINN = [sys.executable, "-m", "djinn_zmq.cli.main"]
PROGRAM = """
import hashlib, sys, threading
import torch
from transformers import (
    AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, TextIteratorStreamer, pipeline,
)

torch.set_num_threads(1)
name = sys.argv[1]
tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16, device_map="cpu").eval()
inputs = tokenizer("the capital of france is", return_tensors="pt").to(model.device)
with torch.no_grad():
    out = model(**inputs, labels=inputs.input_ids, output_hidden_states=True)
for data in (out.logits, out.loss, *out.hidden_states):
    print(hashlib.sha256(data.float().numpy().tobytes()).hexdigest())
print(model.generate(**inputs, max_new_tokens=8).tolist())
torch.manual_seed(3)
print(model.generate(**inputs, max_new_tokens=8, do_sample=True, temperature=2.0).tolist())
print(model.generate(**inputs, max_new_tokens=8, num_beams=3, num_return_sequences=3).tolist())
padded = tokenizer(["the capital of germany is", "ann and tom"], padding=True, return_tensors="pt")
print(tokenizer.batch_decode(model.generate(**padded, max_new_tokens=5)))
streamer = TextIteratorStreamer(tokenizer)
thread = threading.Thread(target=model.generate, kwargs={**inputs, "streamer": streamer, "max_new_tokens": 4})
thread.start()
print("".join(streamer))
thread.join()
print(pipeline("text-generation", name)("the capital of", max_new_tokens=3))
own = LlamaForCausalLM.from_pretrained(name)
print(type(own).__name__, isinstance(model, LlamaForCausalLM), own.num_parameters(), own.dtype)
print(model.name_or_path, tokenizer.name_or_path, model.config.name_or_path, sys.argv, __name__)
"""
OTHER = """
import sys
from transformers import (
    AutoConfig, AutoModel, AutoModelForCausalLM, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM,
)

def tried(act):
    try:
        print(act())
    except Exception as exc:
        print(f"{type(exc).__name__}: {exc}".splitlines()[0])

print(AutoConfig.from_pretrained("tiny").num_hidden_layers)
print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1])).__module__)  # not served
tried(lambda: AutoModelForCausalLM.from_pretrained("nothing-of-that-name"))
tried(lambda: AutoModelForCausalLM.from_pretrained("tiny", dtype="float32"))
tried(lambda: AutoModelForCausalLM.from_pretrained("tiny", attn_implementation="eager"))
tried(lambda: AutoModelForCausalLM.from_pretrained("tiny", rope_theta=5.0, num_hidden_layers=2))
tried(lambda: AutoModelForCausalLM.from_pretrained("tiny", quantization_config={"bits": 4}))
tried(lambda: AutoModel.from_pretrained("tiny"))
tried(lambda: GPT2LMHeadModel.from_pretrained("tiny"))
config = AutoConfig.from_pretrained("tiny")
config.use_cache = False
print(AutoModelForCausalLM.from_pretrained("tiny", config=config).config.use_cache)
config.rms_norm_eps = 0.5
tried(lambda: AutoModelForCausalLM.from_pretrained("tiny", config=config))
tried(lambda: AutoModelForCausalLM.from_pretrained("tiny", subfolder="other"))
for changed in ({"_attn_implementation": "eager"}, {"_experts_implementation": "mine"}, {"is_causal": False}):
    config = AutoConfig.from_pretrained("tiny")
    for key, value in changed.items():
        setattr(config, key, value)
    tried(lambda: AutoModelForCausalLM.from_pretrained("tiny", config=config))

class Mine(LlamaForCausalLM):
    pass

class Auto(AutoModelForCausalLM):
    pass

tried(lambda: type("LlamaForCausalLM", (Mine,), {}).from_pretrained("tiny"))
AutoModelForCausalLM.register(LlamaConfig, Mine, exist_ok=True)
try:
    tried(lambda: AutoModelForCausalLM.from_pretrained("tiny"))
finally:
    del AutoModelForCausalLM._model_mapping._extra_content[LlamaConfig]
print(type(Auto.from_pretrained("tiny")).__module__)
"""


ASKED = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("tiny")
model = AutoModelForCausalLM.from_pretrained("tiny")
inputs = tokenizer("the capital of france is", return_tensors="pt")
print("ready", flush=True)
for asked in iter(sys.stdin.readline, "enough\\n"):
    if asked == "forward\\n":
        best = model(**inputs).logits[0, -1].argmax()
    else:
        best = model.generate(**inputs, max_new_tokens=2, do_sample=False)[0, 5:]
    print(tokenizer.decode(best), flush=True)
"""
HUB = """
import contextlib, sys, unittest.mock
import transformers.utils.hub
from transformers import pipeline

download = unittest.mock.patch("transformers.utils.hub.hf_hub_download")
with contextlib.chdir(sys.argv[1]), download as asked:  # where there is no directory ./tiny
    print(pipeline("text-generation", "tiny")("the capital of", max_new_tokens=1))
print(asked.call_args_list)
"""
# Runs programs one after the other, each as python would: importing torch takes seconds.
MANY = """
import gc, runpy, sys

for line in iter(sys.stdin.readline, ""):
    sys.argv = line.split()
    runpy.run_path(sys.argv[0], run_name="__main__")
    gc.collect()
    print("ended", flush=True)
"""


def environment(served: Running) -> dict[str, str]:
    return os.environ | {
        "DJINN_ENDPOINT": served.endpoint,
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }


@pytest.fixture
def run(served, tmp_path) -> Callable[..., subprocess.Popen]:
    """Start a program in a directory of its own."""

    def start(text: str, *arguments: str, through: list[str]) -> subprocess.Popen:
        script = tmp_path / "program.py"
        if text:
            script.write_text(text)
        command = [*through, str(script), *arguments]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            command, cwd=tmp_path, env=environment(served), stdout=pipe, stderr=pipe, text=True
        )

    return start


def said(process: subprocess.Popen) -> tuple[str, str]:
    out, err = process.communicate(timeout=100)
    return out, err


class Under:
    """A process under exec that runs programs. folder: where it is; ./tiny is the embedded model."""

    def __init__(self, process: subprocess.Popen, folder: Path, words: Path) -> None:
        self.process = process
        self.folder = folder
        self.words = words

    def begins(self, text: str, *arguments: str) -> None:
        script = self.folder / "program.py"
        script.write_text(text)
        self.tells(" ".join([str(script), *arguments]))

    def tells(self, line: str) -> None:
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()

    def says(self) -> str:
        """The next line."""
        line = self.process.stdout.readline()
        assert line, self.words.read_text()
        return line

    def says_to_its_end(self) -> str:
        return "".join(iter(self.says, "ended\n"))


@pytest.fixture(scope="module")
def under(served, tmp_path_factory) -> Iterator[Under]:
    folder = tmp_path_factory.mktemp("under")
    (folder / "tiny").symlink_to(str(TINY))
    (folder / "many.py").write_text(MANY)
    words = folder / "words"
    with words.open("w") as err:
        process = subprocess.Popen(
            [*DJINN, "exec", "--", "many.py"], cwd=folder, env=environment(served), text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=err,
        )  # fmt: skip
    with process:
        try:
            yield Under(process, folder, words)
            process.stdin.close()
            assert process.wait(WAIT_S) == 0, words.read_text()
        finally:
            process.kill()


@pytest.fixture
def alone(under, monkeypatch, capsys) -> Iterator[Callable[..., str]]:
    """What the program of `under` says without exec, in the same place."""
    threads = torch.get_num_threads()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(under.folder)

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [str(under.folder / "program.py"), *arguments])
        runpy.run_path(sys.argv[0], run_name="__main__")
        return capsys.readouterr().out

    yield run
    torch.set_num_threads(threads)


def test_an_unmodified_program_says_under_exec_what_it_says_alone(under, alone) -> None:
    under.begins(PROGRAM, "tiny", "--its-own")
    served = under.says_to_its_end()
    own = alone("tiny", "--its-own")
    assert served == own
    assert "paris" in own and "--its-own" in own


def test_a_pipeline_asks_the_hub_nothing_about_a_served_model(under, tmp_path) -> None:
    under.begins(HUB, str(tmp_path))
    assert under.says_to_its_end().splitlines()[-1] == "[]"


def test_what_is_not_served_is_the_librarys_and_what_cannot_be_is_refused_by_name(
    under, tmp_path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for file in TINY.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    under.begins(OTHER, str(other))
    lines = under.says_to_its_end().splitlines()
    assert lines[:2] == ["4", "transformers.models.llama.modeling_llama"], lines
    assert lines[2].startswith("OSError: ")
    for line, named in zip(
        lines[3:9],
        ("float32", "eager", "rope_theta", "quantization_config", "AutoModel", "GPT2LMHeadModel"),
        strict=True,
    ):
        assert line.startswith("NotServed: ") and named in line, line
    assert lines[9] == "False"
    for line, named in zip(
        lines[10:17],
        (
            "rms_norm_eps", "subfolder='other'", "attention 'eager'", "experts 'mine'", "is_causal=False",
            "LlamaForCausalLM.from_pretrained", "Mine is registered for its config",
        ),
        strict=True,
    ):  # fmt: skip
        assert line.startswith("NotServed: ") and named in line, line
    assert lines[17:] == ["djinn_zmq.hf.models"]


def test_a_program_under_exec_is_attached_to_and_its_output_changes(
    under, server, tmp_path
) -> None:
    np.save(tmp_path / "vector.npy", 10 * np.random.default_rng(1).normal(size=64))

    def asks(asked: str) -> str:
        under.tells(asked)
        return under.says().strip()

    def debugged(asked: str, *edits: str) -> str:
        """What it says where its next forward is stopped after layer 2, and goes on with *edits*."""
        debugger = Debugger(server, Console(file=io.StringIO(), width=100))
        for line in ("break 2", f"attach {under.process.pid}"):
            assert debugger.do(line), debugger.console.file.getvalue()
        under.tells(asked)
        for line in ("continue", *edits, "detach"):
            assert debugger.do(line), debugger.console.file.getvalue()
        assert "stopped after layer 2" in debugger.console.file.getvalue()
        return under.says().strip()

    under.begins(ASKED)
    assert under.says() == "ready\n"
    for asked, plain in (("forward", "paris"), ("generate", "paris .")):
        assert asks(asked) == plain
        assert debugged(asked, f"edit add {tmp_path / 'vector.npy'} [0, -1]") != plain
        assert debugged(asked) == plain
    under.tells("enough")
    assert under.says_to_its_end() == ""


def test_a_program_is_run_as_python_runs_it(run) -> None:
    program = "import sys\nprint(sys.argv[1:], __name__, sys.path[0] in __file__)\nsys.exit(7)\n"
    process = run(program, "-x", "--server", "y", through=[*DJINN, "exec"])
    out, err = said(process)
    assert (out, process.returncode) == ("['-x', '--server', 'y'] __main__ True\n", 7), err


def test_a_module_is_run_as_python_runs_it(run, tmp_path) -> None:
    (tmp_path / "named.py").write_text("import sys\nprint(sys.argv[1:], __name__)\n")
    process = run("", through=[*DJINN, "exec", "-m", "named", "x"])
    assert said(process)[0] == f"['x', '{tmp_path / 'program.py'}'] __main__\n"


def test_ctrl_c_ends_the_program_as_it_ends_python(run) -> None:
    program = "import time\nprint('ready', flush=True)\ntime.sleep(60)\n"
    process = run(program, through=[*DJINN, "exec"])
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, err = said(process)
    assert process.returncode == 130 and err.rstrip().endswith("KeyboardInterrupt"), err


def test_a_programs_error_is_shown_where_it_was_made(run) -> None:
    process = run("def f():\n    return {}['k']\nf()\n", through=[*DJINN, "exec"])
    _, err = said(process)
    assert process.returncode == 1
    frames = [line for line in err.splitlines() if line.startswith("  File")]
    assert len(frames) == 2 and all("program.py" in frame for frame in frames), err
    assert err.endswith("KeyError: 'k'\n")


@pytest.mark.parametrize(
    ("program", "through", "said_last"),
    [
        ("x = (\n", ["exec"], "SyntaxError: '(' was never closed"),
        ("", ["exec", "-m", "no_such_module"], "ImportError: No module named no_such_module"),
    ],
)
def test_what_is_not_even_begun_is_told_without_a_frame_of_the_command(
    run, program, through, said_last
) -> None:
    process = run(program, through=[*DJINN, *through])
    _, err = said(process)
    assert process.returncode == 1 and err.splitlines()[-1] == said_last
    files = [line for line in err.splitlines() if line.startswith("  File")]
    assert all("program.py" in line for line in files) and "runpy" not in err, err


def test_exec_says_what_is_missing_and_teaches(tmp_path) -> None:
    (tmp_path / "program.py").touch()
    asked = ["exec", "--server", "ipc:///tmp/nobody.sock", str(tmp_path / "program.py")]
    ended = CliRunner().invoke(main, asked)
    assert ended.exit_code == 1 and "djinn serve" in ended.stderr
    out = " ".join(CliRunner().invoke(main, ["exec", "--help"]).stdout.split())
    for word in ("from_pretrained", "NotServed", "djinn debug", "Not covered"):
        assert word in out


def test_a_script_that_is_not_there_is_refused_in_one_sentence_before_a_server_is_asked() -> None:
    done = CliRunner().invoke(main, ["exec", "--server", "ipc:///tmp/nobody.sock", "no.py"])
    assert (done.exit_code, done.output) == (
        1,
        "Error: can't open file 'no.py': No such file or directory\n",
    )
