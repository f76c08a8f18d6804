"""How far a long measurement has come, on stderr: a bar on a terminal, else a line now and then."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LINE_EVERY_S = 15.0

Step = Callable[[str], None]  # told what has just been done


@contextmanager
def steps(about: str, total: int, done: int = 0) -> Iterator[Step]:
    """Shows *done* of *total* steps and the time left; yields what is called after each.

    Nothing is drawn while something is timed: on a terminal only when a step is told.
    """
    try:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.progress import TimeRemainingColumn as TimeLeft
    except ImportError:
        bar = None
    else:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeLeft(compact=True, elapsed_when_finished=True),
            TextColumn("{task.fields[now]}"),
        )
        from rich.console import Console

        bar = Progress(*columns, console=Console(stderr=True), auto_refresh=False)
    if bar is None or not sys.stderr.isatty():
        yield _lines(about, total, done)
        return
    with bar:
        task = bar.add_task(about, total=total, completed=done, now="")

        def tell(now: str) -> None:
            bar.update(task, advance=1, now=now, refresh=True)

        yield tell


def _lines(about: str, total: int, done: int) -> Step:
    begin = last = time.monotonic()
    first = done

    def tell(now: str) -> None:
        nonlocal done, last
        done += 1
        moment = time.monotonic()
        if moment - last < LINE_EVERY_S:
            return
        last = moment
        left_s = (moment - begin) / (done - first) * (total - done)
        print(f"{about}: {done} of {total}, {left_s:.0f} s left", file=sys.stderr, flush=True)

    return tell
