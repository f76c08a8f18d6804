"""A user who types commands: in what environment, and what is said to them."""

import contextlib
import os
import pty
import signal
import subprocess
import sys
import threading
from pathlib import Path

from click.testing import CliRunner

from djinn_zmq.cli.main import main

WAIT_S = 60.0

OWN_TERMINAL = """
import fcntl, os, sys, termios
os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


class Started:
    """A command that runs on, and what it has said so far, its engine's words among it.

    terminal: whether it runs in one of its own."""

    def __init__(self, arguments, environment, *, terminal: bool = False) -> None:
        ours, theirs = pty.openpty() if terminal else os.pipe()
        self._ours = os.fdopen(ours, "r+b" if terminal else "rb", buffering=0)
        self.process = subprocess.Popen(
            [sys.executable, *(["-c", OWN_TERMINAL] if terminal else []), *arguments],
            env=environment,
            stdin=theirs if terminal else subprocess.DEVNULL,
            stdout=theirs,
            stderr=theirs,
        )
        os.close(theirs)
        self.words = ""
        self._ended = False
        self._news = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # a terminal whose other end is gone
            for line in self._ours:
                with self._news:
                    self.words += line.decode().replace("\r", "")
                    self._news.notify_all()
        with self._news:
            self._ended = True
            self._news.notify_all()

    def wait_for(self, *either: str) -> None:
        """Until it has said one of these, or has ended."""

        def said() -> bool:
            return any(words in self.words for words in either)

        with self._news:
            self._news.wait_for(lambda: said() or self._ended, WAIT_S)
        assert said(), self.words

    def types(self, keys: bytes) -> None:
        self._ours.write(keys)

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        status = self.process.wait(WAIT_S)
        self._reader.join(WAIT_S)
        return status

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.wait()
        self._ours.close()
        assert "Traceback" not in self.words, self.words


def environment_of(home: Path, cache: Path) -> dict[str, str]:
    """A user's environment, with nothing of this one's servers and models in it."""
    clean = {name: value for name, value in os.environ.items() if name != "DJINN_ENDPOINT"}
    return clean | {"XDG_RUNTIME_DIR": str(home), "DJINN_CACHE": str(cache)}


def run(environment: dict[str, str], *arguments, **more) -> tuple[int, str, str]:
    """`djinn …` to its end: (exit status, what it said on stdout, on stderr)."""
    clean = {"DJINN_ENDPOINT": None} | environment | more
    done = CliRunner(env=clean).invoke(main, list(map(str, arguments)))
    assert isinstance(done.exception, SystemExit | None), done.exception
    return done.exit_code, done.stdout, done.stderr


def run_alone(
    environment: dict[str, str], *arguments, module="djinn_zmq.cli.main", **more
) -> tuple[int, str, str]:
    """The same of a process of its own. module: as in `python -m`."""
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        env=environment | more,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout, done.stderr


def one_sentence(outcome: tuple[int, str, str]) -> str:
    """What a command says that ends at once, with exit status 1 and a single sentence."""
    status, said, complaint = outcome
    assert (status, said) == (1, ""), (status, said, complaint)
    assert complaint.startswith("Error: ") and len(complaint.splitlines()) == 1, complaint
    return complaint
