"""`djinn demo`: the main job, done once on the embedded model, and checked as it goes."""

import os
import signal
import sys
import time

import click
import numpy as np

from djinn_zmq.client.edits import Patch
from djinn_zmq.client.local import local
from djinn_zmq.client.model import Model
from djinn_zmq.client.run import Checkpoint, Run
from djinn_zmq.errors import Lost, RunError

PROMPT = "the capital of france is"
OTHER = "the capital of germany is"
SUBJECT, OTHER_SUBJECT = "france", "germany"
ANSWER, OTHER_ANSWER = "paris", "berlin"
STOP = 2
BACK_S = 60.0  # the restarted engine imports torch and reads the weights again
NOTICED_S = 10.0  # a busy machine takes a second to end a process


@click.command()
def demo() -> None:
    """Stop "the capital of france is" in mid-model, patch france with germany, go on.

    Starts a private server on the CPU with the embedded model `tiny`, and ends it. Exit status 0
    only if everything shown also held.
    """
    begin = time.perf_counter()
    _say("starting a private server, and an engine with the model tiny (0.2 M parameters) …")
    with local("tiny", threads=1) as model:  # at its size a second one only waits
        click.echo(f"  {model!r}")
        click.echo(f"  exactness: {model.info.check}")
        plain = model.run(PROMPT)
        checkpoint = _stop(model)
        _patch_at_every_layer(model)
        _remove_the_edit(checkpoint, plain)
        resumed = _survive_the_engine(model, checkpoint, plain)
        _say("where the time of that last resume went")
        click.echo(_indented(str(resumed.spans)))
    click.secho(f"\nall of it held, in {time.perf_counter() - begin:.1f} s", bold=True)


def _stop(model: Model) -> Checkpoint:
    _say(f'stop "{PROMPT}" after layer {STOP} of {model.num_layers}')
    run = model.run(PROMPT, stop_at=STOP)
    checkpoint = run.checkpoint
    click.echo(f"  {checkpoint!r}, {checkpoint.nbytes} bytes, kept on the server")
    row = np.asarray(checkpoint.hidden[0, -1], np.float32)
    click.echo(
        f"  the last token's residual, only that row fetched: norm {np.linalg.norm(row):.2f}"
    )
    click.echo("  going on from there, the five likeliest next words:")
    for top in checkpoint.resume().top(5):
        bar = "█" * round(30 * top.probability)
        click.echo(f"    {top.token:<10} {top.probability:8.4f}  {bar}")
    return checkpoint


def _patch_at_every_layer(model: Model) -> None:
    """The residual at the subject, and at the last token, swapped for the other prompt's."""
    subject = model.tokens(PROMPT).index(SUBJECT)
    layers = range(model.num_layers + 1)
    here = model.run(PROMPT, save_at=layers).checkpoints
    there = model.run(OTHER, save_at=layers).checkpoints
    _say(f'patch one position\'s residual from "{OTHER}", and resume')
    at_subject, at_last = f'at "{SUBJECT}"', 'at "is"'
    click.echo(f"  {'layer':<6} {at_subject:<24} {at_last:<24}")
    flipped = []
    for layer in layers:
        cells = []
        for position in (subject, -1):
            patch = Patch(there[layer], at=(0, position))
            answer = here[layer].resume([patch]).top(1)[0]
            cells.append((answer.token, answer.probability))
        flipped.append([token == OTHER_ANSWER for token, _ in cells])
        shown = (
            click.style(
                f"{token:<10} {p:.4f}".ljust(24), fg="yellow" if token != ANSWER else "green"
            )
            for token, p in cells
        )
        click.echo(f"  {layer:<6} {' '.join(shown)}")
    first, last = flipped[0], flipped[-1]
    click.echo(
        f"  what makes it {ANSWER} moves from the subject to the last token within the stack"
    )
    _must(first == [True, False], "the subject's residual decides early, the last token's does not")
    _must(last == [False, True], "and late it is the other way round")


def _remove_the_edit(checkpoint: Checkpoint, plain: Run) -> None:
    _say("resume the same checkpoint without any edit")
    _same_bits(checkpoint.resume(), plain)


def _same_bits(run: Run, plain: Run) -> None:
    same = run.logits.tobytes() == plain.logits.tobytes()
    _must(same, f"its {plain.logits.size} logits equal the uninterrupted model's bit for bit")


def _survive_the_engine(model: Model, checkpoint: Checkpoint, plain: Run) -> Run:
    pid = model.server.status().engines[0].pid
    _say(f"kill the engine (pid {pid}) with SIGKILL, and resume the same checkpoint")
    os.kill(pid, signal.SIGKILL)
    begin = time.perf_counter()
    status = _status_after(model, pid)
    click.echo(f"  the server says after {1e3 * (time.perf_counter() - begin):.0f} ms: {status}")
    try:
        run = checkpoint.resume(timeout_s=BACK_S)
    except Lost:  # the request was already on its way to the dead engine
        run = checkpoint.resume(timeout_s=BACK_S)
    click.echo(f"  a new engine had it after {time.perf_counter() - begin:.1f} s")
    _same_bits(run, plain)
    checkpoint.resume()  # makes a new lane, once: the time of the next one is a resume's own
    return checkpoint.resume()


def _status_after(model: Model, pid: int) -> str:
    limit = time.monotonic() + NOTICED_S
    while time.monotonic() < limit:
        engine = model.server.status().engines[0]
        if engine.pid != pid or engine.state not in ("ready", "loading"):
            return f"engine {engine.index} is {engine.state}, restart {engine.restarts}"
    raise RunError(f"the server did not notice in {NOTICED_S:g} s that its engine was killed")


def _say(what: str) -> None:
    click.secho(f"\n▸ {what}", bold=True)


def _must(held: bool, what: str) -> None:
    mark = click.style("✓", fg="green") if held else click.style("✗ not so:", fg="red")
    click.echo(f"  {mark} {what}")
    if not held:
        sys.exit(1)


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())
