"""`djinn exec`: an unmodified program gives under it what it gives alone."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import pytest
from click.testing import CliRunner

from djinn_zmq.cli.main import main

pytest.importorskip("transformers")

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
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GPT2LMHeadModel

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
"""


@pytest.fixture
def run(served, tmp_path) -> Callable[..., subprocess.Popen]:
    """Start a program in a directory of its own, where ./tiny is the embedded model."""
    (tmp_path / "tiny").symlink_to(str(TINY))
    environment = os.environ | {
        "DJINN_ENDPOINT": served.endpoint,
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }

    def start(text: str, *arguments: str, through: list[str]) -> subprocess.Popen:
        script = tmp_path / "program.py"
        if text:
            script.write_text(text)
        command = [*through, str(script), *arguments]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=pipe, stderr=pipe, text=True
        )

    return start


def said(process: subprocess.Popen) -> tuple[str, str]:
    out, err = process.communicate(timeout=100)
    return out, err


def test_an_unmodified_program_says_under_exec_what_it_says_alone(run) -> None:
    alone = run(PROGRAM, "tiny", "--its-own", through=[sys.executable])
    under = run("", "tiny", "--its-own", through=[*DJINN, "exec", "--"])
    own, served = said(alone), said(under)
    assert alone.returncode == 0, own[1]
    assert under.returncode == 0, served[1]
    assert served[0] == own[0]
    assert "paris" in own[0] and "--its-own" in own[0]


def test_what_is_not_served_is_the_librarys_and_what_cannot_be_is_refused_by_name(
    run, tmp_path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for file in TINY.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    out, err = said(run(OTHER, str(other), through=[*DJINN, "exec"]))
    lines = out.splitlines()
    assert lines[:2] == ["4", "transformers.models.llama.modeling_llama"], out + err
    assert lines[2].startswith("OSError: ")
    for line, named in zip(
        lines[3:9],
        ("float32", "eager", "rope_theta", "quantization_config", "AutoModel", "GPT2LMHeadModel"),
        strict=True,
    ):
        assert line.startswith("NotServed: ") and named in line, line
    assert lines[9] == "False"
    assert lines[10].startswith("NotServed: ") and "rms_norm_eps" in lines[10]


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


def test_exec_says_what_is_missing_and_teaches(run) -> None:
    process = run("pass", through=[*DJINN, "exec", "--server", "ipc:///tmp/nobody.sock"])
    assert "djinn serve" in said(process)[1]
    out = subprocess.run(
        [*DJINN, "exec", "--help"], check=True, capture_output=True, text=True
    ).stdout
    out = " ".join(out.split())
    for word in ("from_pretrained", "NotServed", "djinn debug", "Not covered"):
        assert word in out


def test_a_script_that_is_not_there_is_refused_in_one_sentence_before_a_server_is_asked() -> None:
    done = CliRunner().invoke(main, ["exec", "--server", "ipc:///tmp/nobody.sock", "no.py"])
    assert (done.exit_code, done.output) == (
        1,
        "Error: can't open file 'no.py': No such file or directory\n",
    )
