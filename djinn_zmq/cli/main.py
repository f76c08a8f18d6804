"""`djinn`: the command line. Each command has a file of its own, imported when it is used."""

import importlib

import click

from djinn_zmq.errors import DjinnError
from djinn_zmq.version import __version__

COMMANDS = {
    "serve": ("djinn_zmq.server.command", "Serve models: the process that owns the GPU."),
    "ps": ("djinn_zmq.cli.ps", "Show models, engines, sessions, checkpoints, memory."),
    "stop": ("djinn_zmq.cli.stop", "Stop your server."),
    "pull": ("djinn_zmq.cli.pull", "Bring a real model into the cache."),
    "exec": ("djinn_zmq.cli.exec", "Run an unmodified Hugging Face program on served models."),
    "keys": ("djinn_zmq.cli.keys", "Make and allow keys for remote clients."),
    "decompose": ("djinn_zmq.cli.decompose", "Show where a resume's time goes, floor by floor."),
    "debug": ("djinn_zmq.cli.debug", "Stop a model or a running program, look, edit, go on."),
    "demo": ("djinn_zmq.cli.demo", "Stop, patch and resume a model, in a minute."),
}


class Djinn(click.Group):
    """Imports a command's module only when it is run: `djinn ps` must not wait for the others."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module, _ = COMMANDS[name]
        found = vars(importlib.import_module(module))
        command: click.Command = found[name] if name in found else found[f"{name}_"]
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, about) for name, (_, about) in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> None:
        try:
            super().invoke(ctx)
        except DjinnError as exc:
            raise click.ClickException(str(exc)) from exc


@click.command(cls=Djinn)
@click.version_option(__version__, prog_name="djinn")
def main() -> None:
    """Stop a transformer between two layers, look, edit, go on.

    \b
      djinn demo                   see it work, on this machine, in a minute
      djinn serve --model tiny     serve the embedded model
      djinn ps                     what the server holds
    """


if __name__ == "__main__":
    main(prog_name="djinn")
