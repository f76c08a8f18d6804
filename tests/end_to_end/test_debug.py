"""`djinn debug`: its words on a real server, as a script, and in a real pseudo-terminal."""

import asyncio
import fcntl
import io
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

import djinn_zmq as djinn
from djinn_zmq import aio
from djinn_zmq.cli.debug import looking, moving
from djinn_zmq.cli.debug.debugger import WORDS, Debugger
from djinn_zmq.cli.debug.terminal import Words

FRANCE, GERMANY = "the capital of france is", "the capital of germany is"
WAIT_S = 60.0
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[()][A-Z0-9]|\x1b[=>78]|[\r\x07]")

# The terminal must be its own, so that Ctrl-C there is a signal.
IN_TERMINAL = """
import fcntl, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from djinn_zmq.cli.main import main
main(prog_name="djinn")
"""

assert looking and moving  # their words register themselves


@pytest.fixture
def debugger(server, tiny) -> Debugger:
    return Debugger(server, Console(file=io.StringIO(), width=100), tiny)


def does(debugger: Debugger, *lines: str) -> str:
    """What carrying out *lines* shows; none of them is refused."""
    debugger.console.file = io.StringIO()
    for line in lines:
        assert debugger.do(line), shown(debugger)
    return shown(debugger)


def shown(debugger: Debugger) -> str:
    return debugger.console.file.getvalue()


def test_a_run_stops_steps_goes_back_and_finishes(debugger, tiny):
    assert "stopped after layer 2" in does(debugger, "break 2", f"run {FRANCE}")
    assert "stopped after layer 3" in does(debugger, "step")
    assert "stopped after layer 1" in does(debugger, "back 2")
    assert "stopped after layer 2" in does(debugger, "c")
    assert "in layers.2.mlp" in does(debugger, "b layers.2.mlp", "c")
    words = does(debugger, "delete", "continue")
    best = tiny.run(FRANCE).top(1)[0]
    assert "finished" in words and f"{best.token}" in words and f"{best.probability:.4f}" in words
    assert "paris" in does(debugger, "run")  # the last prompt again, with no breakpoints


def test_edits_are_pending_until_it_goes_on_and_branches_stay_here(debugger, tiny):
    point = tiny.run(FRANCE, stop_at=2).checkpoint
    other = tiny.run(GERMANY, stop_at=2).checkpoint
    does(debugger, "break 2", f"run {GERMANY}")
    assert debugger.number(debugger.point) == 1
    does(debugger, f"run {FRANCE}", "edit patch #1 [0, 3]", "edit scale 2 [0, 0]")
    expected = point.resume([djinn.Patch(other, at=(0, 3)), djinn.Scale(2.0, at=(0, 0))])
    assert "berlin" in does(debugger, "branch")
    assert "1  patch #1 [0, 3]" in does(debugger, "edit") and debugger.point is not None
    does(debugger, "continue")
    assert debugger.outcome.logits.tobytes() == expected.logits.tobytes()
    assert "patch #1 [0, 3]; scale 2 [0, 0]" in does(debugger, "info branches")


def test_the_lens_shows_what_was_and_what_would_be(debugger, tiny):
    lens = tiny.run(FRANCE, save_at="all").lens()
    words = does(debugger, "break 2", f"run {FRANCE}", "lens")
    rows = re.findall(r"^ *(▶ )?(\d) (.+)$", words, re.MULTILINE)
    assert [int(layer) for _, layer, _ in rows] == [0, 1, 2, 3, 4]
    assert [bool(mark) for mark, _, _ in rows] == [False, False, True, False, False]
    for _, layer, cells in rows:
        assert [cell.strip() for cell in cells.split()] == [
            lens[int(layer), place][0][0] for place in range(5)
        ]
    does(debugger, "edit zero [0, 3]")
    ahead = debugger.point.resume([djinn.Zero(at=(0, 3))], save_at=[4]).lens()
    assert does(debugger, "lens -1").split("\n")[5].split()[-1] == ahead[4, 4][0][0]


def test_what_is_printed_is_what_is_there(debugger, tiny):
    point = tiny.run(FRANCE, stop_at=2).checkpoint
    does(debugger, "break 2", f"run {FRANCE}")
    words = does(debugger, "print")
    assert all(f"{norm:.3f}" in words for norm in point.norms()[0])
    assert f"{float(point.hidden[0, -1, 0]):.4g}"[:5] in does(debugger, "print [0, -1]")
    assert point.top(1)[0].token in does(debugger, "print top 3")
    assert "equal bit for bit" in does(debugger, "print diff #1")
    words = does(debugger, "print attention")
    assert "mean of its heads" in words and words.split()[:2] == ["the", "capital"]
    assert "compute" in does(debugger, "print spans")
    assert "#1 after layer 2" in does(debugger, "print #1")
    assert "0:the 1:capital 2:of 3:france 4:is" in does(debugger, "where")
    debugger.console.width = 40
    assert "\n-" not in does(
        debugger, "print [0, -1]"
    )  # a line begins where the numbers do: "[" or " "


@pytest.mark.parametrize(
    "typed",
    [
        "rum", "re", "continue", "step", "back", "edit zero", "where", "print", "lens", "branch", "info nothing",
        "break 99", "break 2 3", "break if", "watch", "watch hot", "delete 7", "delete x", "detach",
        "attach", "attach 99999999", "print [", "help nothing", "model nothing/at/all", "quit now",
        "run", "info runs x",
    ],
)  # fmt: skip
def test_a_typing_mistake_is_answered_in_one_line(debugger, typed):
    assert not debugger.do(typed)
    (line,) = shown(debugger).splitlines()
    assert line.startswith("error: ") and "Traceback" not in line
    assert not debugger.breaks and debugger.point is None


@pytest.mark.parametrize(
    "typed",
    [
        "edit explode", "edit scale", "edit scale x", "edit zero [0,", "edit patch #99", "print nonsense",
        "print [0, 99]", "print top 3 [0, 1]", "print norms [0]", "print spans x", "print top 0", "print top x", "print diff", "print attention 99", "print [a]",
        "lens 99", "lens x", "step x", "step 0", "back 99", "branch add 1,2,3", "continue now", "print #7",
    ],
)  # fmt: skip
def test_a_mistake_where_it_is_stopped_changes_nothing(debugger, typed):
    does(debugger, "break 2", f"run {FRANCE}")
    point = debugger.point
    debugger.console.file = io.StringIO()
    assert not debugger.do(typed)
    (line,) = shown(debugger).splitlines()
    assert line.startswith("error: ")
    assert debugger.point is point and not debugger.edits


def test_it_stops_at_modules_one_after_another_and_steps_back_through_them(debugger):
    places = ["embedding", ".self_attn", "layers.2.mlp", "norm"]
    does(debugger, *(f"break {place}" for place in places))
    words = does(debugger, f"run {FRANCE}", *["continue"] * 6)
    assert [line.split()[3].rstrip(".") for line in words.splitlines() if "stopped at" in line] == [
        "embedding", "layers.0.self_attn", "layers.1.self_attn", "layers.2.self_attn", "layers.2.mlp",
        "layers.3.self_attn", "norm",
    ]  # fmt: skip
    assert "layers.3.self_attn" in does(debugger, "back") and "paris" in does(debugger, "c", "c")


def test_what_one_model_came_to_is_said_in_its_own_tokens_also_when_another_is_chosen(
    debugger, tmp_path
):
    for name in ("config.json", "model.safetensors"):  # tiny without its tokenizer
        shutil.copy(f"djinn_zmq/models/tiny/{name}", tmp_path)
    words = does(debugger, f"run {FRANCE}", "break 2", "run", "print")
    assert "france" in words and debugger.outcome is not None
    does(debugger, f"model {tmp_path}")
    assert does(debugger, "print #1") in words
    assert debugger.outcome is None  # nothing that the next model does is measured by it
    debugger.model.close()


def test_a_bad_path_is_refused_when_it_runs_and_watching_stops_where_it_holds(debugger):
    does(debugger, "break layers.1.no_such")
    assert not debugger.do(f"run {FRANCE}")
    assert "no_such" in shown(debugger)
    assert "stopped after layer 0" in does(debugger, "delete", "watch norm > 1", f"run {FRANCE}")


def test_what_is_no_number_any_more_is_shown_as_it_is(debugger):
    """A run that gives NaN is what one looks into."""
    does(debugger, "break 2", "break 3", f"run {FRANCE}", "edit scale 1e38")
    assert "nan" in does(debugger, "branch") and "nan" in does(debugger, "continue", "print top")
    assert re.search(r"is +nan", does(debugger, "print"))
    assert "nan" in does(debugger, "continue") and "paris" in does(debugger, "delete", "run")


def test_every_word_completes_and_has_help(debugger):
    from prompt_toolkit.document import Document

    def completions(text: str) -> list[str]:
        found = Words(debugger).get_completions(Document(text), None)
        return [one.text for one in found]

    assert completions("") == sorted(WORDS)
    assert completions("br") == ["branch", "break"]
    assert "layers.1.mlp" in completions("break layers.1.")
    assert completions("edit pa") == ["patch"] and completions("info se") == ["server", "sessions"]
    assert f"{debugger.model.session_id:016x}" in completions("attach ")
    for name, word in WORDS.items():
        assert word.about and name in does(debugger, f"help {name}")


def test_it_attaches_to_a_program_and_changes_what_that_gets(debugger, served):
    with served.connect() as theirs, ThreadPoolExecutor(1) as program:
        model = theirs.model("tiny")
        does(debugger, "break 2", f"run {GERMANY}", f"attach {model.session_id:016x}")
        answer = program.submit(model.run, FRANCE)
        assert "stopped after layer 2" in does(debugger, "continue")
        assert "paris" in does(debugger, "branch")
        assert "held" in does(debugger, "info runs")
        assert "stopped after layer 3" in does(debugger, "step")
        assert not debugger.do("back") and not debugger.do("run x")
        does(debugger, "detach")
        assert answer.result(WAIT_S).top(1)[0].token == "paris"
        does(debugger, f"attach {model.session_id:016x}")
        answer = program.submit(model.run, FRANCE)
        does(debugger, "continue", "edit patch #1 [0, 3]", "detach")
        assert answer.result(WAIT_S).top(1)[0].token == "berlin"


def test_ctrl_c_an_instant_before_it_waits_ends_the_waiting_too(debugger, served, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    with served.connect() as theirs:
        model = theirs.model("tiny")
        does(debugger, f"attach {model.session_id:016x}")
        with monkeypatch.context() as patch:
            patch.setattr("djinn_zmq.cli.debug.moving._let_go", interrupt)
            assert "still attached: 'continue' waits again" in does(debugger, "continue")
        does(debugger, "detach")


def test_a_step_of_a_generation_looks_at_all_tokens_before_it(debugger, served):
    with served.connect() as theirs, ThreadPoolExecutor(1) as program:
        session = theirs.model("tiny").session()
        does(debugger, "break 2 if step 1", f"attach {session.id:016x}")
        answer = program.submit(session.generate(FRANCE, max_new_tokens=2).finish)
        does(debugger, "continue")
        words = does(debugger, "print attention")
        weights = debugger.point.attention()[0, :, 0].astype(np.float32).mean(0)
        does(debugger, "detach")
        assert answer.result(WAIT_S).reason == "length"
    heads, row, _ = words.splitlines()
    assert heads.split() == ["the", "capital", "of", "france", "is", "paris"]
    assert row.split() == ["paris", *(f"{weight:.2f}" for weight in weights)]


def test_a_process_whose_number_is_also_how_a_session_begins_is_not_guessed(debugger, monkeypatch):
    mine = debugger.model.session_id
    theirs = [
        SimpleNamespace(id=0x4711 << 48, pid=9, yours=True, model="tiny"),
        SimpleNamespace(id=0xAB << 56, pid=4711, yours=True),
        SimpleNamespace(id=mine, pid=4711, yours=True),
    ]
    monkeypatch.setattr(debugger.server, "sessions", lambda: theirs)
    assert not debugger.do("attach 4711")
    assert "4711 may be 4711000000000000, ab00000000000000" in shown(debugger)
    assert not debugger.do("attach 47110")  # not a part of a process's number either
    assert moving._named(debugger, "47110000") is theirs[0]
    assert moving._named(debugger, "9") is theirs[0]
    assert moving._named(debugger, "0x4711") is theirs[0]
    theirs[1:] = []
    assert not debugger.do("attach 0x")  # not the only one there is
    assert "no session of yours is 0x" in shown(debugger)


def test_a_program_that_ends_as_it_is_stepped_leaves_the_debugger(debugger, served):
    async def program() -> None:
        async with aio.connect(served.endpoint) as theirs:
            model = await theirs.model("tiny")
            await asyncio.to_thread(does, debugger, "break 2", f"attach {model.session_id:016x}")
            answer = asyncio.ensure_future(model.run(FRANCE))
            await asyncio.to_thread(does, debugger, "continue")
            answer.cancel()
            with pytest.raises(asyncio.CancelledError):
                await answer
            stepping = asyncio.ensure_future(asyncio.to_thread(does, debugger, "step"))
            while "gone" not in shown(debugger):  # then it waits for the program's next run
                await model.ping()
        assert "detached" in await stepping

    asyncio.run(asyncio.wait_for(program(), WAIT_S))
    assert "paris" in does(debugger, "delete", f"run {FRANCE}")


def test_it_waits_for_the_next_stop_where_the_program_gave_up_what_is_held(debugger, served):
    async def program() -> None:
        async with aio.connect(served.endpoint) as theirs:
            model = await theirs.model("tiny")
            await types("break 2", f"attach {model.session_id:016x}")
            answer = asyncio.ensure_future(model.run(FRANCE))
            await types("continue")
            answer.cancel()
            with pytest.raises(asyncio.CancelledError):
                await answer
            answer = asyncio.ensure_future(model.run(FRANCE))
            words = await types("continue")
            assert "gone: nothing is held" in words and "stopped after layer 2" in words
            await types("edit skip 4")
            assert not debugger.do("detach") and "'edit clear'" in shown(debugger)
            await types("edit clear", "detach")
            assert (await (await answer).top(1))[0].token == "paris"

    async def types(*lines: str) -> str:
        return await asyncio.to_thread(does, debugger, *lines)

    asyncio.run(asyncio.wait_for(program(), WAIT_S))


# ---- as a command


def command(*words: str, stdin: str = "") -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "djinn_zmq.cli.main", "debug", *words],
        check=False,
        capture_output=True,
        text=True,
        input=stdin,
        timeout=WAIT_S,
    )


def test_a_script_of_lines_runs_to_its_first_mistake(served, tmp_path):
    script = tmp_path / "lines"
    script.write_text(f"# a comment\nbreak 2\nrun {FRANCE}\n")
    lines = ["-x", str(script), "-c", "edit zero [0, 3]", "-c", "contineu", "-c", "continue"]
    done = command("tiny", "--server", served.endpoint, *lines)
    assert done.returncode == 1
    assert "did you mean 'continue'?" in done.stdout and "finished" not in done.stdout
    done = command("tiny", "--server", served.endpoint, stdin=f"break 2\nrun {FRANCE}\ncontinue\n")
    assert (done.returncode, done.stderr) == (0, "")
    assert "stopped after layer 2" in done.stdout and "paris" in done.stdout
    assert "Traceback" not in done.stdout


def test_what_is_missing_is_said_in_one_line(served, tmp_path):
    done = command("--server", f"ipc://{tmp_path}/none", "-c", "help")
    assert done.returncode == 1 and done.stderr.startswith("Error: no server at ")
    without = "import sys; sys.modules['rich.console'] = None; from djinn_zmq.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", without, "debug", "-c", "help"],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "pip install 'djinn-zmq[debug]'" in done.stderr
    assert "Traceback" not in done.stderr


class Terminal:
    """A pseudo-terminal with the debugger in it."""

    def __init__(self, ours: int, process: subprocess.Popen) -> None:
        self.ours = ours
        self.process = process
        self.seen = ""

    def types(self, text: str) -> None:
        os.write(self.ours, text.encode())

    def until(self, words: str) -> str:
        """What it has shown since the last `until`, up to *words*."""
        limit = time.monotonic() + WAIT_S
        while words not in (plain := ESCAPES.sub("", self.seen)):
            left_s = limit - time.monotonic()
            assert left_s > 0, f"no {words!r} in {plain[-2000:]!r}"
            if select.select([self.ours], [], [], left_s)[0]:
                try:
                    part = os.read(self.ours, 1 << 16).decode(errors="replace")
                except OSError:
                    part = ""
                assert part, f"it ended without {words!r}: {plain[-2000:]!r}"
                self.seen += part
        found, _, self.seen = plain.partition(words)
        return found + words

    def line(self, text: str, words: str) -> str:
        """Type *text*; what is shown until *words* and the next prompt."""
        self.types(f"{text}\r")
        self.until(text)
        return self.until(words) + self.until("(tiny")

    def resize(self, columns: int) -> None:
        fcntl.ioctl(self.ours, termios.TIOCSWINSZ, struct.pack("4H", 40, columns, 0, 0))
        self.process.send_signal(signal.SIGWINCH)

    def interrupts(self, words: str) -> None:
        """Ctrl-C as soon as that is a signal and no key; once more where it came a little too soon."""
        limit, pressed = time.monotonic() + WAIT_S, 0.0
        while words not in self.seen:
            assert time.monotonic() < limit, self.seen
            at_work = termios.tcgetattr(self.ours)[3] & termios.ISIG
            if at_work and time.monotonic() > pressed + 2.0:
                pressed = time.monotonic()
                self.types("\x03")
            if select.select([self.ours], [], [], 0.05)[0]:
                self.seen += os.read(self.ours, 1 << 16).decode(errors="replace")
        self.until(words)
        self.until("(tiny")


@contextmanager
def terminal(served, tmp_path, *words: str) -> Iterator[Terminal]:
    ours, theirs = pty.openpty()
    fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("4H", 40, 100, 0, 0))
    env = os.environ | {
        "TERM": "xterm-256color",
        "PROMPT_TOOLKIT_NO_CPR": "1",
        "DJINN_CACHE": str(tmp_path),
    }
    env.pop("COLUMNS", None)
    process = subprocess.Popen(
        [sys.executable, "-c", IN_TERMINAL, "debug", "--server", served.endpoint, *words],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=env,
        start_new_session=True,
    )
    os.close(theirs)
    try:
        yield Terminal(ours, process)
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def test_a_session_with_every_word_in_a_real_terminal(served, tmp_path):
    with served.connect() as theirs, terminal(served, tmp_path, "tiny") as screen:
        program = theirs.model("tiny").session_id
        screen.until("(tiny)")
        screen.line("help", "watch CONDITION")
        screen.line("break 2", "breakpoint 1: 2")
        screen.line("watch nan", "breakpoint 2: if nan")
        screen.line(f"run {FRANCE}", "stopped after layer 2")
        screen.line("where", "#1 stopped after layer 2")
        screen.line("print", "norm")
        wide = screen.line("lens", "paris")
        assert "capital" in wide and "\x1b" not in wide
        screen.resize(32)
        assert "3 of 5 positions to the left" in screen.line("lens", "not shown")
        screen.resize(100)
        screen.line("edit zero [0, 3]", "pending: zero [0, 3]")
        screen.line("branch", "before")
        screen.line("step", "stopped after layer 3")
        screen.line("back", "stopped after layer 2")
        screen.line("info breaks", "if nan")
        screen.line("delete", "\n")
        screen.line("continue", "finished")
        screen.line("model", "tiny: LlamaForCausalLM")
        screen.line(f"attach {program:016x}", "attached to")
        screen.line("detach", "detached")
        screen.line("lesn", "did you mean 'lens'?")
        assert "Traceback" not in screen.seen
        screen.types("\x04")
        assert screen.process.wait(WAIT_S) == 0
    assert "+lens" in (tmp_path / "debug_history").read_text()


def test_ctrl_c_cancels_the_run_and_drops_the_line_and_the_debugger_stays(served, tmp_path):
    engine = served.engine_pid()
    with served.connect() as theirs, terminal(served, tmp_path, "tiny") as screen:
        program = theirs.model("tiny")
        screen.until("(tiny)")
        screen.types("run what is not meant\x03")
        screen.line("info", "info breaks")
        os.kill(engine, signal.SIGSTOP)  # a run that takes as long as it likes
        try:
            screen.types(f"run {FRANCE}\r")
            screen.interrupts("cancelled")
        finally:
            os.kill(engine, signal.SIGCONT)
        screen.line(f"run {FRANCE}", "paris")
        screen.line("break 2", "breakpoint 1")
        screen.line(f"attach {program.session_id:016x}", "attached to")
        screen.types("continue\r")
        screen.interrupts("still attached")
        with ThreadPoolExecutor(1) as thread:
            answer = thread.submit(program.run, FRANCE)
            screen.line("continue", "stopped after layer 2")
            assert not answer.done()
            screen.types("\x04")  # what is held goes on
            assert answer.result(WAIT_S).top(1)[0].token == "paris"
        assert screen.process.wait(WAIT_S) == 0
