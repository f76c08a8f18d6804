"""`djinn debug`: stop a model, look, edit, go on, at a prompt; or from a script.

reading    what is typed, as what is meant
debugger   where it stands, and one line at a time
moving     words that go somewhere        looking    words that show
drawing    tables, heat maps              terminal   the prompt
"""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from djinn_zmq.cli import endpoint as on_endpoint
from djinn_zmq.client.server import Server, connect
from djinn_zmq.errors import Unreachable

NEEDED = "'djinn debug' needs {}: pip install 'djinn-zmq[debug]'"
DEFAULT = "tiny"


@click.command()
@on_endpoint.options
@click.argument("model", required=False)
@click.option(
    "-c",
    "--command",
    "commands",
    multiple=True,
    metavar="LINE",
    help="Carry out this line; repeatable. Then leave, with status 1 at the first that is refused.",
)
@click.option(
    "-x",
    "--script",
    type=click.File("r"),
    help="Carry out the lines of a file, or of standard input (-), before those of -c.",
)
@click.option("--attach", metavar="SESSION|PID", help="Begin by attaching to a program's session.")
def debug(
    endpoint: str | None,
    key: Path | None,
    model: str | None,
    commands: tuple[str, ...],
    script: Any,
    attach: str | None,
) -> None:
    """Debug MODEL: stop it between two layers, look, edit, go on; 'help' lists the words.

    Where no server runs, one is started for the time of this command.

    \b
      djinn debug tiny
      djinn debug tiny -c "break 2" -c "run the capital of france is" -c lens
      djinn debug --attach 4711
    """
    console = _console()
    lines = _lines(script, commands)
    if attach:
        lines = [f"attach {attach}", *lines]
    typed = not script and not commands and sys.stdin.isatty()
    if not typed and not script and not commands:
        lines += [line.rstrip("\n") for line in sys.stdin]
    named = endpoint is not None or key is not None or attach is not None
    with _server(endpoint, key, None if attach else model, private=not named) as (server, name):
        from djinn_zmq.cli.debug import looking, moving  # their words register themselves

        assert looking and moving
        from djinn_zmq.cli.debug.debugger import Debugger

        chosen = server.model(name) if name else None
        debugger = Debugger(server, console, chosen)
        try:
            if not _script(debugger, lines, echo=not typed, keep_on=typed):
                sys.exit(1)
            if typed:
                _interact(debugger)
        finally:
            if debugger.attached is not None:
                debugger.attached.detach()


def _console() -> Any:
    try:
        from rich.console import Console
    except ImportError as exc:
        raise click.ClickException(NEEDED.format("rich")) from exc
    return Console()


def _interact(debugger: Any) -> None:
    try:
        from djinn_zmq.cli.debug.terminal import interact
    except ImportError as exc:
        raise click.ClickException(NEEDED.format("prompt_toolkit")) from exc
    debugger.say("[dim]'help' lists the words, Ctrl-D leaves[/]")
    interact(debugger)


def _lines(script: Any, commands: Iterable[str]) -> list[str]:
    lines = [line.rstrip("\n") for line in script] if script else []
    return [*lines, *commands]


def _script(debugger: Any, lines: Iterable[str], *, echo: bool, keep_on: bool) -> bool:
    """False where a line was refused; no further one is carried out then, unless *keep_on*."""
    from rich.text import Text

    for line in lines:
        if debugger.over:
            break
        if echo and line.strip():
            debugger.say(Text(f"> {line}", style="bold cyan"))
        if not debugger.do(line) and not keep_on:
            return False
    return True


@contextmanager
def _server(
    endpoint: str | None, key: Path | None, model: str | None, *, private: bool
) -> Iterator[tuple[Server, str | None]]:
    """The server, and the model to begin with. private: where none runs, one for this time."""
    try:
        server = connect(endpoint, key=key)
    except Unreachable:
        if not private:
            raise
        from djinn_zmq.client.local import local

        click.echo(f"djinn: no server runs: starting one with {model or DEFAULT}", err=True)
        with local(model or DEFAULT) as one:
            yield one.server, one.name
        return
    with server:
        yield server, model
