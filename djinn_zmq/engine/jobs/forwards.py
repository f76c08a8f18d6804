"""A program's own forwards: the model's forward with the arguments it was called with, stepped.

The past is a value like a conversation's, of as many rows as the program has; each call that keeps keys
and values makes a new one, of one piece. What beams, batches and assistants do to it (other rows, fewer
positions) is done by transformers' own methods, on a cache made of it for the call.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from djinn_zmq.engine.jobs import inside
from djinn_zmq.engine.jobs.branches import NO_TENSOR, Branch, ForwardJob
from djinn_zmq.engine.jobs.job import EngineSession, Halt, Turns
from djinn_zmq.engine.jobs.loans import FRAME_LIMIT
from djinn_zmq.engine.jobs.plans import Start
from djinn_zmq.engine.jobs.runs import Runner
from djinn_zmq.engine.jobs.talks import Talker, check_room
from djinn_zmq.engine.models.caches import Past
from djinn_zmq.engine.models.loading import ServedModel
from djinn_zmq.engine.state.keeping import TORCH_DTYPES, Keeping, new_id
from djinn_zmq.errors import PromptError, RequestError
from djinn_zmq.spans import Stopwatch
from djinn_zmq.wire.forwards import Change, Crop, Forward, Repeat, Select
from djinn_zmq.wire.messages import BRANCH, Kept, Wanted
from djinn_zmq.wire.tensors import INLINE_LIMIT, SLOT_FROM, Tensor

ALL = Wanted(None, (), "all", 0)
FRAMES_LIMIT = 32  # of one reply; what is over goes in slots
ROWS_LIMIT = 1024  # of a past that was changed, where neither it nor the ids have more
CHANGES_LIMIT = 64
IGNORED = -100  # a label that does not count
MASKED = (
    "the checkpoint is of a program's forward with a mask, positions or several rows of its own: it can "
    "be looked at, but only that forward goes on from it"
)
Sent = Callable[[Tensor], np.ndarray]  # what a client sent, in host memory
Changes = list[tuple[Change, np.ndarray | None]]
OF_FORWARDS = "a past that a program's forwards made: only these go on from it"


class Forwarder:
    """Makes jobs of forwards and works on them."""

    def __init__(self, keeping: Keeping, runner: Runner, talker: Talker) -> None:
        self._keeping = keeping
        self._runner, self._loans = runner, runner.loans
        self._talker = talker

    def begin(
        self,
        asked: Forward,
        buffers: Sequence[bytes | memoryview],
        session: EngineSession,
        model: ServedModel,
        watch: Stopwatch,
        *,
        shared: bool,
    ) -> tuple[ForwardJob, Turns]:
        """Raises PromptError, RequestError for what the model cannot be called with; Lost, NoSessions."""
        with watch.span("decode"):
            ids = self._keeping.ids_sent(asked.ids, buffers, session.owner)
            model.check_ids(ids)
            if asked.cached or asked.past:
                start = self._talker.start(asked.past, 0, session, model, bound=True)
            else:
                start = Branch(np.zeros((1, 0), np.int64), Past(None, (), 0), 0)
            if asked.past and not asked.cached:
                raise RequestError(
                    "a forward behind a past, without a cache: use_cache=False with one"
                )
            tokens = start.ids if asked.past else np.zeros((len(ids), 0), np.int64)
            changes = self._changes(asked, buffers, session)
            limit = max(ROWS_LIMIT, len(tokens), len(ids))
            for change, rows in changes:
                tokens = _changed(change, rows, tokens, limit)
            if len(tokens) != len(ids):
                raise PromptError(f"{len(ids)} rows of ids behind a past of {len(tokens)}")
            past, count = tokens.shape[1], ids.shape[1]
            check_room(past + count, 0, model)
            sent = partial(self._keeping.sent, buffers=buffers, owner=session.owner)
            arguments, default = _arguments(asked, ids, past, model, sent)
            wished = _wished(asked, ids, model, sent)
            bound = "" if default and (len(ids) == 1 or not asked.cached) else MASKED
        job = ForwardJob(
            session,
            model,
            ids,
            0,
            ALL,
            shared,
            watch,
            start=start,
            below=(),
            tokens=np.concatenate([tokens, ids], axis=1),
            call=asked,
            arguments=arguments,
            wished=wished,
            bound=bound,
        )
        return job, self._loans.settling(job, self._work(job, changes))

    def _changes(
        self, asked: Forward, buffers: Sequence[bytes | memoryview], session: EngineSession
    ) -> Changes:
        """What is done to its past: each with the rows that it names, if any."""
        if len(asked.changes) > CHANGES_LIMIT:
            raise RequestError(f"{len(asked.changes)} changes of a past: at most {CHANGES_LIMIT}")
        return [
            (change, self._keeping.ids_sent(change.rows, buffers, session.owner))
            if isinstance(change, Select)
            else (change, None)
            for change in asked.changes
        ]

    # ---- the work

    def _work(self, job: ForwardJob, changes: Changes) -> Turns:
        job.advance("start")
        if job.call.cached:
            yield from self._talker.begin(job)
            job.working.begin(job.ids.shape[1])
        if changes:
            with job.watch.span("restore"):
                self._change(job, changes)
        logits = yield from self._forward(job)
        if job.call.cached:
            job.working.finish()
            self._end(job)
        yield from self._take(job, logits)
        yield from self._loans.until_done(job)
        job.advance("finish")

    def _change(self, job: ForwardJob, changes: Changes) -> None:
        """Another past for the job: its own, with the *changes*."""
        cache, caches = job.working.cache, job.model.stepper.caches
        try:
            for change, rows in changes:
                if rows is not None:
                    cache.reorder_cache(torch.from_numpy(rows).to(job.model.device))
                elif isinstance(change, Repeat):
                    cache.batch_repeat_interleave(change.times)
                elif change.count:
                    cache.crop(-change.count)
        except Exception as exc:
            raise RequestError(f"its past cannot be changed so: {exc}") from exc
        length = job.tokens.shape[1] - job.ids.shape[1]
        past = job.working.whole(length) if length else caches.nothing(job.session.account)
        job.working = caches.open(past, 0, job.session.account)
        job.working.begin(job.ids.shape[1])

    def _forward(self, job: ForwardJob) -> Generator[Halt | None, None, torch.Tensor | Any]:
        stepper, keep = job.model.stepper, self._loans.keep_in_room
        job.fresh = True
        if job.session.attached is not None:
            inside.attend(job, Start(0, fresh=True))
        ids = torch.from_numpy(job.ids).to(job.model.device)

        def record() -> Any:
            return stepper.record(ids, job.cache, job.arguments)

        with job.watch.span("record"):
            recording = record()
        if job.plan is not None:
            recording = yield from inside.recorded(job, recording, keep, record)
        hidden = yield from self._runner.through(job, recording.embedded, recording)
        yield None
        last = job.wished.keys() == {"logits_to_keep"} and job.call.keep == 1
        own = None if last or not job.wished else partial(self._outputs, job, ids)
        if job.plan is not None:
            return (yield from inside.tail(job, hidden, recording, keep, last=last, own=own))
        with job.watch.span("compute"):
            return own(hidden) if own else stepper.tail(ids, hidden, last=last, lent=True)

    def _outputs(self, job: ForwardJob, ids: torch.Tensor, hidden: torch.Tensor) -> Any:
        layers = [*job.layers[1:-1], hidden]
        found = job.model.stepper.outputs(ids, layers, job.wished)
        if job.layers:  # the model's own, just now, knew of no positions and no edits
            found["hidden_states"] = (job.layers[0], *found["hidden_states"][1:])
        return found

    def _take(self, job: ForwardJob, found: Any) -> Iterator[None]:
        """What travels, and how."""
        job.kind = job.model.stepper.kind
        if isinstance(found, torch.Tensor):
            job.outcome.append(("logits", -1, found))
        else:
            for name in ("loss", "logits"):
                if (value := found.get(name)) is not None:
                    job.outcome.append((name, -1, value))
            states = found.get("hidden_states") or ()
            job.outcome += [("hidden_states", place, one) for place, one in enumerate(states)]
        room, frames = (SLOT_FROM if job.shared else FRAME_LIMIT), 0
        for place, (_, _, data) in enumerate(job.outcome):
            if data.nbytes <= INLINE_LIMIT:
                continue
            if data.nbytes > room or frames == FRAMES_LIMIT:
                job.apart[place] = yield from self._loans.keep_in_room(job, data, -1)
                job.kept.append(job.apart[place])
            else:
                frames += 1

    def _end(self, job: ForwardJob) -> None:
        past = job.working.past = job.working.whole(job.tokens.shape[1])
        session = job.session
        branch = Branch(job.tokens, past, 0, bound=OF_FORWARDS)
        job.ended = Kept(new_id(), session.id, job.id, BRANCH, NO_TENSOR, past.length, tiers=())
        session.branches[job.ended.id] = branch


def _changed(change: Change, rows: np.ndarray | None, tokens: np.ndarray, limit: int) -> np.ndarray:
    """A past's tokens after *change*. limit: how many rows it may come to."""
    count, length = tokens.shape
    if not length:
        raise RequestError("there is no past to change")
    if isinstance(change, Crop):
        if not 0 <= change.count <= length:
            raise RequestError(f"a past of {length} positions without {change.count} of them")
        return tokens[:, : length - change.count]
    if isinstance(change, Repeat):
        if not 1 <= change.times <= limit // count:
            raise RequestError(
                f"{count} rows of a past, each {change.times} times: at most {limit} rows"
            )
        return np.repeat(tokens, change.times, axis=0)
    assert rows is not None
    if rows.ndim != 1 or not 1 <= rows.size <= limit:
        raise RequestError(f"rows of shape {rows.shape} of a past: (n,), at most {limit}")
    if rows.min() < 0 or rows.max() >= count:
        raise RequestError(f"rows {rows.min()} to {rows.max()} of a past that has {count}")
    return tokens[rows]


# ---- what it is called with, checked in host memory: on a GPU a wrong index ends the process


def _arguments(
    asked: Forward, ids: np.ndarray, past: int, model: ServedModel, sent: Sent
) -> tuple[dict[str, Any], bool]:
    """What goes with the ids; and is it what a call without would have meant?"""
    arguments: dict[str, Any] = {}
    default = True
    if asked.mask is not None:
        mask = sent(asked.mask)
        if not mask.ndim or mask.shape[0] not in (1, len(ids)):
            raise RequestError(f"attention_mask {mask.shape} for {len(ids)} rows of ids")
        if mask.ndim == 2:  # models look things up in it, and count positions by it
            _check_mask(mask, len(ids), model)
        arguments["attention_mask"] = _on_device(mask, model)
        default = mask.ndim == 2 and bool((mask == 1).all())
    if asked.positions is not None:
        positions = sent(asked.positions)
        if positions.dtype != np.int64 or positions.shape not in ((1, ids.shape[1]), ids.shape):
            raise RequestError(
                f"position_ids {positions.dtype} {positions.shape}: int64 (1, {ids.shape[1]}) or "
                f"{ids.shape}"
            )
        limit = model.info.max_positions
        if positions.min() < 0 or (limit and positions.max() >= limit):
            raise PromptError(
                f"position_ids {positions.min()} to {positions.max()}: "
                f'"{model.info.name}" has 0 to {limit - 1}'
            )
        arguments["position_ids"] = _on_device(positions, model)
        default = default and bool((positions == np.arange(past, past + ids.shape[1])).all())
    return arguments, default


def _check_mask(mask: np.ndarray, rows: int, model: ServedModel) -> None:
    odd, limit = mask[(mask != 0) & (mask != 1)], model.info.max_positions
    if len(mask) != rows:
        raise RequestError(f"attention_mask {mask.shape} for {rows} rows of ids: a row for each")
    if odd.size:
        raise RequestError(f"attention_mask holds {odd[0]}: 0 or 1 for each position")
    if limit and mask.shape[1] > limit:
        raise PromptError(
            f'attention_mask of {mask.shape[1]} positions: "{model.info.name}" takes at most {limit}'
        )


def _wished(asked: Forward, ids: np.ndarray, model: ServedModel, sent: Sent) -> dict[str, Any]:
    wished: dict[str, Any] = {}
    if asked.hidden:
        wished["output_hidden_states"] = True
    if isinstance(asked.keep, Tensor):
        keep, extent = sent(asked.keep), ids.shape[1]
        if keep.dtype != np.int64 or keep.ndim != 1 or not keep.size:
            raise RequestError(f"logits_to_keep {keep.dtype} {keep.shape}: int64 (n,)")
        if keep.min() < -extent or keep.max() >= extent:
            raise RequestError(f"logits_to_keep {keep.tolist()} of {extent} positions")
        wished["logits_to_keep"] = _on_device(keep, model)
    elif asked.keep:
        if asked.keep < 0:
            raise RequestError(f"logits_to_keep {asked.keep}: at least 0")
        wished["logits_to_keep"] = asked.keep
    if "logits_to_keep" in wished and not model.stepper.keeps_last:
        raise RequestError(f'"{model.info.name}" takes no logits_to_keep')
    if asked.labels is not None:
        labels = sent(asked.labels)
        if labels.dtype != np.int64 or labels.shape != ids.shape:
            raise RequestError(
                f"labels {labels.dtype} {labels.shape}: int64 {ids.shape}, as the ids"
            )
        counted, last = labels[labels != IGNORED], model.info.vocab_size - 1
        if counted.size and not 0 <= counted.min() <= counted.max() <= last:
            raise RequestError(
                f"labels {counted.min()} to {counted.max()}: 0 to {last}, or {IGNORED} for what "
                "does not count"
            )
        wished["labels"] = _on_device(labels, model)
    return wished


def _on_device(array: np.ndarray, model: ServedModel) -> torch.Tensor:
    kind = TORCH_DTYPES[array.dtype.name]
    flat = torch.from_numpy(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    return flat.view(kind).reshape(array.shape).to(model.device)
