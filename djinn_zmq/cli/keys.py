"""`djinn keys`: who may connect over TCP."""

from pathlib import Path

import click

from djinn_zmq.bus import keys as keyfiles
from djinn_zmq.settings import cache_dir


def _keys_option(command: click.Command) -> click.Command:
    return click.option(
        "--keys",
        "directory",
        type=click.Path(path_type=Path, file_okay=False),
        default=lambda: cache_dir() / "keys",
        help="Where keys are kept; what `djinn serve --keys` is given. "
        "[default: keys in $DJINN_CACHE, else $XDG_CACHE_HOME/djinn, else ~/.cache/djinn]",
    )(command)


@click.group()
def keys() -> None:
    """Make keys for a server and its clients, and allow clients.

    \b
    On the server's machine:
      djinn keys new server --keys DIR
      djinn keys new alice --keys DIR        alice.key, and server.pub, go to alice
      djinn keys allow DIR/alice.pub --keys DIR
      djinn serve --host 0.0.0.0 --keys DIR
    On alice's:
      djinn ps --server tcp://HOST:5556 --key alice.key

    To let alice in no more, remove DIR/allowed/alice.pub: connections that she has stay until
    they end, or the server does.
    """


@keys.command()
@click.argument("name", metavar="server|NAME")
@_keys_option
def new(name: str, directory: Path) -> None:
    """Make a pair: NAME.key (secret, mode 0600) and NAME.pub."""
    pair, public = keyfiles.new_pair(directory, name)
    click.echo(f"{pair}  keep this secret\n{public}  give this away")


@keys.command()
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@_keys_option
def allow(file: Path, directory: Path) -> None:
    """Let the client with this public key in. Works while the server runs."""
    click.echo(f"allowed: {keyfiles.allow(directory, file)}")


@keys.command("list")
@_keys_option
def list_allowed(directory: Path) -> None:
    """Show who is allowed."""
    allowed = sorted((directory / "allowed").glob("*.pub"))
    for path in allowed:
        click.echo(f"{keyfiles.read(path).public.decode()}  {path.stem}")
    if not allowed:
        click.echo(f"nobody is allowed yet in {directory}")
