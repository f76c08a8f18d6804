"""`djinn exec`: an unmodified Hugging Face program on served models."""

import os
import runpy
import sys
import types
from pathlib import Path
from typing import Any

import click

from djinn_zmq.cli import endpoint as on_endpoint
from djinn_zmq.cli import programs
from djinn_zmq.client.server import connect

INTERRUPTED = 130


@click.command(
    name="exec",
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
@on_endpoint.options
@click.option("-m", "as_module", is_flag=True, help="SCRIPT is a module's name, as in python -m.")
@click.argument("script")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def exec_(
    endpoint: str | None, key: Path | None, as_module: bool, script: str, arguments: tuple[str, ...]
) -> None:
    """Run SCRIPT with the models of a server, unchanged.

    \b
      djinn serve --model tiny &
      djinn exec script.py --its own options
      djinn debug                       meanwhile: attach, stop its next forward, edit

    Where SCRIPT says AutoModelForCausalLM.from_pretrained(NAME), its own class's (LlamaForCausalLM), or
    pipeline("text-generation", NAME), and NAME is a name the server serves, or the directory of a model it
    has loaded, it gets the served model: forward, loss, hidden states and generate with the same values,
    keys and values on the server. AutoTokenizer, AutoConfig and GenerationConfig of NAME are the served
    model's. Any other name is the library's, as without djinn.

    Refused by name (NotServed): weights and modules in the program (parameters, hooks on layers, training,
    adapters), attention weights, static and quantized caches, another dtype or attention than it is served
    with, a layer's or torch's code replaced, autocast, a config changed after loading, other
    model classes. torch.compile changes nothing. Not covered: processes the script starts, and models it
    loads without from_pretrained.
    """
    source = b"" if as_module else _source(script)
    server = connect(endpoint, key=key)
    programs.install(server)
    sys.argv = [script, *arguments]
    try:
        if as_module:
            sys.path[0] = os.getcwd()
            runpy.run_module(script, run_name="__main__", alter_sys=True)
        else:
            _run_file(script, source)
    except SystemExit:
        raise
    except BaseException as exc:  # noqa: BLE001  the script's own, shown as python would
        exc.__traceback__ = _of_script(exc.__traceback__)
        sys.excepthook(type(exc), exc, exc.__traceback__)
        sys.stdout.flush()
        sys.exit(INTERRUPTED if isinstance(exc, KeyboardInterrupt) else 1)


def _source(script: str) -> bytes:
    try:
        return Path(script).read_bytes()
    except OSError as exc:
        raise click.ClickException(f"can't open file '{script}': {exc.strerror}") from exc


def _run_file(script: str, source: bytes) -> None:
    main: Any = types.ModuleType("__main__")
    main.__file__, main.__builtins__ = script, __builtins__
    sys.modules["__main__"] = main
    sys.path[0] = os.path.dirname(os.path.realpath(script))
    exec(compile(source, script, "exec"), main.__dict__)  # noqa: S102  it is what was asked for


def _of_script(trace: Any) -> Any:
    """Without the frames of this command; None for what was not even begun, as a syntax error's."""
    own = {__file__, runpy.run_module.__code__.co_filename}  # <frozen runpy>
    while trace is not None and trace.tb_frame.f_code.co_filename in own:
        trace = trace.tb_next
    return trace
