"""Conversations: runs that go on from a past, and generations, token by token.

A job takes a value (`branches`), works on a cache of its own, and what it comes to is a new value: so
branches go on from one past side by side and never see each other.

    generate    forward(prompt) → token → forward(token) → token → …
    step              0             0           1            1       a stop is in a step, at a layer
"""

from collections.abc import Generator, Iterator, Sequence
from functools import partial

import msgspec
import numpy as np
import torch

from djinn_zmq.engine.jobs import inside, replies
from djinn_zmq.engine.jobs.branches import NO_TENSOR, Branch, Midway, TalkJob, midway_of
from djinn_zmq.engine.jobs.job import EngineSession, Halt, Job, Part, Turns
from djinn_zmq.engine.jobs.loans import FRAME_LIMIT
from djinn_zmq.engine.jobs.plans import Start
from djinn_zmq.engine.jobs.runs import Opening, Runner, check_logits
from djinn_zmq.engine.models.loading import ServedModel
from djinn_zmq.engine.models.sampling import Sampler
from djinn_zmq.engine.models.spelling import Spelling
from djinn_zmq.engine.state.keeping import Entry, Keeping, new_id
from djinn_zmq.errors import EditError, Lost, NoSessions, PromptError, RequestError, StopError
from djinn_zmq.settings import format_bytes
from djinn_zmq.spans import Stopwatch
from djinn_zmq.wire.edits import Edit, Skip
from djinn_zmq.wire.messages import BRANCH, IDS_LIMIT, Kept, Resume, Wanted
from djinn_zmq.wire.stops import NOTHING, Stops
from djinn_zmq.wire.talks import Continue, Generate


class Talker:
    """Makes jobs of what sessions ask, and works on them."""

    def __init__(self, keeping: Keeping, runner: Runner) -> None:
        self._keeping = keeping
        self._runner, self._loans = runner, runner.loans

    # ---- from a request to a job

    def run(
        self,
        asked: Continue,
        buffers: Sequence[bytes | memoryview],
        session: EngineSession,
        model: ServedModel,
        watch: Stopwatch,
        *,
        shared: bool,
    ) -> tuple[TalkJob, Turns]:
        """A job for a run behind a branch's tokens. Raises RequestError, Lost; nothing is done yet."""
        with watch.span("decode"):
            start = self.start(asked.branch, asked.static, session, model)
            tokens = self._with_prompt(asked, start, buffers, session, model)
            if tokens.shape[1] == start.past.length:
                raise PromptError("an empty prompt cannot be run")
            check_room(tokens.shape[1], start.static, model)
            self._check(asked.wanted, Start(0, fresh=True), model, tokens[:, start.past.length :])
        job = self._job(start, tokens, session, model, watch, asked.wanted, shared)
        return job, self._loans.settling(job, self._run(job, None))

    def resume(
        self,
        asked: Resume,
        buffers: Sequence[bytes | memoryview],
        session: EngineSession,
        model: ServedModel,
        watch: Stopwatch,
        *,
        shared: bool,
    ) -> tuple[Job, Turns]:
        """A job that goes on from a checkpoint, a session's or another."""
        entry = self._keeping.find(asked.checkpoint, session.owner)
        if entry.midway is None and not entry.past:
            return self._runner.resume(asked, buffers, session, model, watch, shared=shared)
        with watch.span("decode"):
            midway = midway_of(entry, session)
            at = Start(entry.layer, entry.place)
            self._check(asked.wanted, at, model, entry.ids)
            _check_skips_nothing(asked.edits)
        job = self._job(midway.branch, None, session, model, watch, asked.wanted, shared, midway)
        job.layer, job.place = entry.layer, entry.place
        opening = self._runner.opening(job, entry, asked, buffers)
        return job, self._loans.settling(job, self._run(job, opening))

    def generate(
        self,
        asked: Generate,
        buffers: Sequence[bytes | memoryview],
        session: EngineSession,
        model: ServedModel,
        watch: Stopwatch,
        *,
        shared: bool,
    ) -> tuple[TalkJob, Turns]:
        """A job that generates. Raises as `run` and `resume` do."""
        with watch.span("decode"):
            entry = midway = None
            if asked.checkpoint:
                entry = self._keeping.find(asked.checkpoint, session.owner)
                midway = midway_of(entry, session)
            start = (
                midway.branch
                if midway is not None
                else self.start(asked.branch, asked.static, session, model)
            )
            tokens = self._with_prompt(asked, start, buffers, session, model)
            if not tokens.size:
                raise PromptError("neither text nor token ids: nothing to generate from")
            if asked.max_new_tokens < 0:
                raise RequestError(f"max_new_tokens {asked.max_new_tokens}: at least 1")
            check_room(tokens.shape[1], start.static, model, asked.max_new_tokens or 1)
            _check_answer_fits(tokens.shape[1], asked.max_new_tokens or 1)
            _check_logits_fit(asked.wanted, model)
            step, own = 0, start.past.length
            if midway is not None and tokens.shape[1] > start.ids.shape[1]:
                own = start.ids.shape[1]  # a prompt's forward is the first, behind the rest of that
            elif midway is not None:  # its steps are those of the generation that stopped
                step = midway.step or 0
            most = asked.max_new_tokens or _room(tokens.shape[1], start.static, model)
            last = step + most - 1
            # Where nothing is to be run, the first token's forward has been.
            _check_steps(asked.steps, step if tokens.shape[1] > own else step + 1, last)
            at = Start(0, fresh=True, step=0, last_step=last)
            self._check(asked.wanted, at, model, tokens[:, own:])
            _check_skips_nothing(asked.edits)
        job = self._job(start, start.ids, session, model, watch, asked.wanted, shared, midway)
        job.asked = asked
        if entry is not None:
            job.layer, job.place = entry.layer, entry.place
        job.step = (midway.step or 0) if midway is not None else 0
        job.sampler = Sampler(asked.sampling, start.generator, model.device, model.info.vocab_size)
        job.spelling = Spelling(model.tokenizer, tokens[0].tolist(), start.unspelled)
        opening = None
        if entry is not None:
            opening = self._runner.opening(job, entry, asked, buffers)
        return job, self._loans.settling(job, self._generate(job, opening, tokens))

    def start(
        self,
        number: int,
        static: int,
        session: EngineSession,
        model: ServedModel,
        *,
        bound: bool = False,
    ) -> Branch:
        """What is gone on from: branch *number*, or a beginning. Raises Lost, NoSessions, RequestError.

        bound: by a program's forward.
        """
        if model.info.no_sessions:
            raise NoSessions(f'"{model.info.name}" serves no sessions: {model.info.no_sessions}')
        if number:
            branch = session.branches.get(number)
            if branch is None:
                raise Lost(
                    f"branch {number:x} is gone: it was released, or the engine that held its "
                    "keys and values died"
                )
            if bool(branch.bound) != bound:
                raise RequestError(branch.bound or "a conversation's branch is no past of forwards")
            return branch
        if static:
            self._check_static(static, model)
        nothing = model.stepper.caches.nothing(session.account)
        return Branch(np.zeros((1, 0), np.int64), nothing, static)

    def _check_static(self, count: int, model: ServedModel) -> None:
        """Raises RequestError for a static cache of *count* positions that cannot be."""
        if count < 0:
            raise RequestError(f"a static cache of {count} positions: at least 1")
        limit = model.info.max_positions
        if limit and count > limit:
            raise RequestError(
                f'a static cache of {count} positions: "{model.info.name}" takes at most {limit}'
            )
        nbytes, free = (
            count * model.stepper.caches.position_nbytes,
            self._keeping.device.free_nbytes(),
        )
        if nbytes > free:
            raise RequestError(
                f"a static cache of {count} positions takes {format_bytes(nbytes)}: "
                f"{format_bytes(free)} are free"
            )

    def _check(self, wanted: Wanted, at: Start, model: ServedModel, ids: np.ndarray) -> None:
        """Raises RequestError for what cannot be wanted of a run that begins so."""
        check_logits(wanted, model, 1)
        self._runner.planner.plan(wanted, (), at, model, ids)

    def _job(
        self,
        start: Branch,
        tokens: np.ndarray | None,
        session: EngineSession,
        model: ServedModel,
        watch: Stopwatch,
        wanted: Wanted,
        shared: bool,
        midway: Midway | None = None,
    ) -> TalkJob:
        tokens = start.ids if tokens is None else tokens
        return TalkJob(
            session,
            model,
            tokens[:, start.past.length :],
            0,
            wanted,
            shared,
            watch,
            start=start,
            below=() if midway is None else midway.below,
            tokens=tokens,
            step=None if midway is None else midway.step,
        )

    def _with_prompt(
        self,
        asked: Continue | Generate,
        start: Branch,
        buffers: Sequence[bytes | memoryview],
        session: EngineSession,
        model: ServedModel,
    ) -> np.ndarray:
        """The branch's tokens and behind them what was asked with: int64 (1, positions)."""
        parts = [start.ids]
        if asked.ids is not None:
            ids = self._keeping.ids_sent(asked.ids, buffers, session.owner)
            model.check_ids(ids)
            if len(ids) != 1:
                raise PromptError(f"{len(ids)} prompts: a session is one conversation")
            parts.append(ids)
        if asked.text:
            begins = not any(part.size for part in parts)
            ids = model.encode((asked.text,), begins=begins)
            if ids.size:
                model.check_ids(ids)
            parts.append(ids)
        return np.concatenate(parts, axis=1)

    # ---- the work

    def _run(self, job: TalkJob, opening: Opening | None) -> Turns:
        """One forward, or the rest of one, and the logits that are wanted."""
        job.advance("start")
        yield from self.begin(job)
        # As the model's own forward, unless it is a generation's: see `Stepper.tail`.
        whole = job.wanted.logits == "all" or job.step is None and job.wanted.logits != "none"
        logits = yield from self._forward(job, opening, last=not whole)
        if logits is not None:
            job.working.finish()
            if job.wanted.logits != "none":
                job.logits = logits if job.wanted.logits == "all" else logits[:, -1]
                yield from self._loans.keep_large_logits(job)
            self._end(job, logits[:, -1].clone())
        yield from self._loans.until_done(job)
        job.advance("stop" if job.stopped else "finish")

    def _generate(self, job: TalkJob, opening: Opening | None, tokens: np.ndarray) -> Turns:
        """*tokens*: with the prompt. opening: where a forward is to be finished first; behind which nothing of
        what is wanted is due where a prompt follows, whose own forward is step 0."""
        assert job.asked is not None and job.sampler is not None
        job.advance("start")
        yield from self.begin(job)
        logits = job.start.logits
        prompt = tokens.shape[1] > job.tokens.shape[1]
        if opening is not None:
            logits = yield from self._step(job, opening, NOTHING if prompt else None)
        if not job.reason and tokens.shape[1] > job.working.length:
            if prompt:  # it is another generation
                job.step = 0
            job.tokens = tokens
            logits = yield from self._step(job, None)
        ends = job.model.ends if job.asked.ends is None else job.asked.ends
        room = _room(job.tokens.shape[1], job.start.static, job.model)
        made, most = 0, job.asked.max_new_tokens or room
        while not job.reason:
            assert logits is not None and job.step is not None
            token = job.sampler.draw(logits)
            if job.kept or job.sent:
                yield from self._loans.until_done(job)
                job.sent = ()
            yield Part(*replies.of_token(job, token, logits))
            job.begun = True
            self._loans.settle(job)
            made += 1
            job.step += 1
            job.tokens = np.append(job.tokens, [[token]], axis=1)
            if token in ends:
                job.reason = "end"
            elif made == most:
                job.reason = "length"
            else:
                logits = yield from self._step(job, None)
        if job.reason != "stop":
            self._end(job, None)
        yield from self._loans.until_done(job)
        job.advance("stop" if job.reason == "stop" else "finish")

    def begin(self, job: TalkJob) -> Iterator[None]:
        """Have the past where the layers read it, and a cache to go on from it with."""
        start = job.start
        job.ends.append(partial(self._track, job))
        yield from self._loans.pin(job, start.past, job.below)
        with job.watch.span("restore"):
            caches = job.model.stepper.caches
            job.working = caches.open(start.past, start.static, job.session.account, job.below)

    def _track(self, job: TalkJob) -> None:
        """What the job has added to the past may be moved, from now on."""
        if hasattr(job, "working"):
            segments = [one for node in job.working.past.chain() for one in node.segments]
            self._keeping.vault.track(job.session.id, [*segments, *job.working.taken])

    def _step(
        self, job: TalkJob, opening: Opening | None, wanted: Wanted | None = None
    ) -> Generator[Halt | None, None, torch.Tensor | None]:
        """One forward of a generation: (1, vocab), behind the last token; None where it stopped.

        wanted: in place of what is asked for in its step.
        """
        if wanted is None:
            wanted = _wanted_in(job, self._runner.first_ahead(job) if opening is not None else 0)
        job.wanted = wanted
        logits = yield from self._forward(job, opening, last=True)
        if logits is None:
            job.reason = "stop"
            return None
        job.working.finish()
        return logits[:, -1]

    def _forward(
        self, job: TalkJob, opening: Opening | None, *, last: bool
    ) -> Generator[Halt | None, None, torch.Tensor | None]:
        """The tokens that the cache has not seen, through the layers: logits (1, positions, vocab),
        or of the last position alone; None where it stopped.

        opening: as in Runner._work, at `job.layer` and `job.place`.
        """
        stepper, keep = job.model.stepper, self._loans.keep_in_room
        if opening is None:
            job.layer, job.place, job.id = 0, "", new_id()
            if job.working.hollow:
                past = job.working.past
                yield from self._loans.pin(job, past, ())  # others may have branched off it, too
                job.working = stepper.caches.open(past, job.start.static, job.session.account)
        job.ids = np.ascontiguousarray(job.tokens[:, job.working.length :])
        self._plan(job, opening is None)
        job.working.begin(job.ids.shape[1])
        ids = torch.from_numpy(job.ids).to(job.model.device)
        cache = job.working.cache
        hidden: torch.Tensor | None = None
        unchanged: Entry | None = None
        if opening is not None:
            hidden, unchanged = yield from opening
        with job.watch.span("record"):
            recording = stepper.record(ids, cache)
        if hidden is None and job.plan is not None:
            recording = yield from inside.recorded(
                job, recording, keep, lambda: stepper.record(ids, cache)
            )
        if not job.stopped:
            given = recording.embedded if hidden is None else hidden
            hidden = yield from self._runner.through(job, given, recording, unchanged)
        if job.stopped or hidden is None:
            return None
        yield None
        if job.plan is not None:
            return (yield from inside.tail(job, hidden, recording, keep, last=last))
        with job.watch.span("compute"):
            return stepper.tail(ids, hidden, last=last, lent=True)

    def _plan(self, job: TalkJob, fresh: bool) -> None:
        """What the forward at hand stops and saves at."""
        again = job.asked is not None and not fresh
        start = Start(job.layer, job.place, fresh, job.step, again)
        planned = self._runner.planner.plan(job.wanted, (), start, job.model, job.ids)
        job.stop_at, job.save_at, job.plan = planned
        job.stopped, job.fresh = False, fresh
        job.held = None
        if planned != (None, (), None) or job.session.attached is not None:
            job.working.commit()
        if job.session.attached is not None:
            inside.attend(job, start)

    def _end(self, job: TalkJob, logits: torch.Tensor | None) -> None:
        """Keep what the job has come to as a branch of its session."""
        past = job.working.commit()
        if past.length < job.tokens.shape[1]:
            logits = None
        session = job.session
        branch = job.stand(past, logits)
        job.ended = Kept(new_id(), session.id, job.id, BRANCH, NO_TENSOR, past.length, tiers=())
        session.branches[job.ended.id] = branch


def check_room(count: int, static: int, model: ServedModel, new: int = 1) -> None:
    """Raises PromptError where more tokens would be run than the model, or the cache, takes.

    new: tokens to come, of which the last is not run.
    """
    limit = model.info.max_positions
    if limit and count + new - 1 > limit:
        more = f" and {new} new ones" if new > 1 else ""
        raise PromptError(f'{count} tokens{more}: "{model.info.name}" takes at most {limit}')
    if static and count + new - 1 > static:
        more = f" and {new} new ones" if new > 1 else ""
        raise PromptError(f"{count} tokens{more}: the session's static cache has {static} places")


def _check_answer_fits(count: int, new: int) -> None:
    """Raises PromptError where a generation's reply could not name all of its tokens: they travel in one frame."""
    if count + new > IDS_LIMIT:
        raise PromptError(f"{count} tokens and {new} new ones: at most {IDS_LIMIT} fit a message")


def _check_logits_fit(wanted: Wanted, model: ServedModel) -> None:
    """A token's logits travel in one frame, with the token."""
    nbytes = model.info.vocab_size * model.stepper.model.dtype.itemsize
    if wanted.logits == "last" and nbytes > FRAME_LIMIT:
        raise RequestError(
            f"the logits of {model.info.vocab_size} tokens take {nbytes} bytes, a part of an answer "
            f"at most {FRAME_LIMIT}: ask for the likeliest, logits=20 say"
        )


def _check_skips_nothing(edits: tuple[Edit, ...]) -> None:
    for edit in edits:
        if isinstance(edit, Skip):
            raise EditError(
                f"Skip({edit.layer!r}) in a session: a layer left out would keep no keys and values"
            )


def _room(count: int, static: int, model: ServedModel) -> int:
    """How many tokens may be generated behind *count* until the model, the cache, or the reply takes no more."""
    # The last is not run.
    limits = [limit + 1 for limit in (model.info.max_positions, static) if limit]
    return min([*limits, IDS_LIMIT]) - count


def _check_steps(steps: tuple[int, ...], first: int, last: int) -> None:
    """Raises StopError where none of them can come."""
    if steps and not any(first <= step <= last for step in steps):
        has = f"steps {first} to {last}" if first <= last else "no forward to run"
        raise StopError(f"steps {', '.join(map(str, sorted(steps)))}: this generation has {has}")


def _wanted_in(job: TalkJob, first: int) -> Wanted:
    """What is wanted in the step at hand. first: the first number of layers that is ahead in it."""
    assert job.asked is not None
    wanted, steps = job.asked.wanted, job.asked.steps
    if steps and job.step not in steps:
        return msgspec.structs.replace(wanted, stop_at=None, save_at=())
    if not first or isinstance(wanted.stop_at, Stops):
        return wanted
    stop = wanted.stop_at
    assert not isinstance(stop, Stops)
    return msgspec.structs.replace(
        wanted,
        stop_at=stop if stop is not None and stop >= first else None,
        save_at=tuple(layer for layer in wanted.save_at if layer >= first),
    )
