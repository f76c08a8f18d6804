"""A measurement that breaks off: what it has is written, and why there is no more is said."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from djinn_zmq.errors import Lost, Unreachable
from djinn_zmq.probe.results import NotMeasured, Results, write


@contextmanager
def written(results: Results, path: Path | None) -> Iterator[None]:
    """Where the server goes within the block, or Ctrl-C comes, *results* as they stand go to *path*.

    path: None: nowhere, as nobody asked for a file. What happens before anything is measured is
    raised as it is; later, that the server is gone is a ClickException.
    """
    try:
        yield
    except (Lost, Unreachable, ConnectionError, KeyboardInterrupt) as exc:
        if not (results.samples or results.tables):
            raise
        by_hand = isinstance(exc, KeyboardInterrupt)
        why = (
            "the measurement was interrupted" if by_hand else "the server is gone in mid-benchmark"
        )
        results.not_measured.append(NotMeasured("what was still to come", why))
        kept = "; nothing is kept without --json"
        if path is not None:
            write(results, path)
            kept = f"; what was measured until then is in {path}"
        if by_hand:
            click.echo(f"\n{why}{kept}", err=True)
            raise
        raise click.ClickException(f"{why} ({exc}){kept}") from exc
