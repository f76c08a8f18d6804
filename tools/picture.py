"""A command's terminal output as a picture: `python -m tools.picture docs/demo.svg -- djinn demo`."""

import os
import pty
import subprocess
from pathlib import Path

import click
from rich.console import Console
from rich.text import Text


def output_of(command: tuple[str, ...], columns: int) -> str:
    """What *command* prints on a terminal, colours and all. Raises CalledProcessError."""
    ours, theirs = pty.openpty()
    env = os.environ | {"COLUMNS": str(columns), "TERM": "xterm-256color"}
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=theirs, env=env)
    os.close(theirs)
    parts = []
    while True:
        try:
            part = os.read(ours, 1 << 16)
        except OSError:  # EIO: the other end is closed
            break
        if not part:
            break
        parts.append(part)
    os.close(ours)
    if process.wait():
        raise subprocess.CalledProcessError(process.returncode, command)
    return b"".join(parts).decode().replace("\r\n", "\n")


@click.command()
@click.argument("target", type=click.Path(path_type=Path, dir_okay=False))
@click.argument("command", nargs=-1, required=True)
@click.option("--columns", default=92, show_default=True, help="Width of the terminal.")
@click.option("--title", default="", help="In the window's title bar. [default: the command]")
def main(target: Path, command: tuple[str, ...], columns: int, title: str) -> None:
    """Run COMMAND in a terminal and draw what it printed as an SVG."""
    text = output_of(command, columns)
    with open(os.devnull, "w") as nowhere:
        console = Console(record=True, width=columns, file=nowhere, force_terminal=True)
        console.print(Text.from_ansi(text))
    console.save_svg(str(target), title=title or " ".join(command))
    click.echo(f"drawn: {target}")


if __name__ == "__main__":
    main(prog_name="python -m tools.picture")
