"""A run: a generator that does one layer each time it is asked, so that others get their turn.

What it stops with is data (a checkpoint in a slot, the token ids), not the generator: that ends
with its reply, and a resume is a new run that starts further up.
"""

from collections.abc import Generator, Iterator, Sequence

import torch

from djinn_zmq.engine.jobs import inside
from djinn_zmq.engine.jobs.job import Change, EngineSession, Given, Halt, Halting, Job, Turns
from djinn_zmq.engine.jobs.loans import Loans
from djinn_zmq.engine.jobs.plans import Planner, Start
from djinn_zmq.engine.models import editing
from djinn_zmq.engine.models.loading import ServedModel
from djinn_zmq.engine.models.places import BEFORE, Place
from djinn_zmq.engine.models.recordings import Recordings
from djinn_zmq.engine.models.stepping import Recording
from djinn_zmq.engine.state.keeping import Entry, Keeping
from djinn_zmq.errors import EditError, RequestError
from djinn_zmq.settings import MIB
from djinn_zmq.spans import Stopwatch
from djinn_zmq.wire.edits import Edit, Patch, Skip
from djinn_zmq.wire.messages import Resume, Run, Wanted
from djinn_zmq.wire.talks import Generate
from djinn_zmq.wire.tensors import Device, Tensor

FRESH = Start(0, fresh=True)


# What a job starts with and may not change (None: its ids), and the checkpoint that it is, if any.
Opening = Generator[Halt | None, None, tuple[torch.Tensor | None, Entry | None]]


class Runner:
    """Makes jobs of requests and works on them."""

    def __init__(self, keeping: Keeping) -> None:
        self._keeping = keeping
        self.loans = Loans(keeping)
        self.planner = Planner()
        self.recordings = Recordings()

    # ---- from a request to a job

    def begin(
        self,
        asked: Run,
        buffers: Sequence[bytes | memoryview],
        session: EngineSession,
        model: ServedModel,
        watch: Stopwatch,
        *,
        shared: bool,
    ) -> tuple[Job, Turns]:
        """A job for a fresh run. Raises RequestError for what cannot be run; nothing is done yet."""
        with watch.span("decode"):
            if asked.ids is not None:
                ids = self._keeping.ids_sent(asked.ids, buffers, session.owner)
            else:
                ids = model.encode(asked.text)
            model.check_ids(ids)
            check_logits(asked.wanted, model, len(ids))
            start = Start(0, fresh=True)
            planned = self.planner.plan(asked.wanted, asked.edits, start, model, ids)
        job = Job(session, model, ids, 0, asked.wanted, shared, watch, *planned, fresh=True)
        if asked.edits:
            sources = self.sources(session, asked.edits)
            self.loans.hold(job, sources.values())
            self.loans.read(job, None, asked.edits)
            job.edit = self._edit(session, asked.edits, buffers, sources)
        return job, self.loans.settling(job, self._work(job, None))

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
        """A job that goes on from a checkpoint: a branch, with its edits made.

        Raises UnknownCheckpoint, LayerError, EditError; the checkpoint is as before in any case.
        """
        with watch.span("decode"):
            entry = self._keeping.find(asked.checkpoint, session.owner)
            layer = entry.layer
            if layer < 0 or entry.session != session.id:
                raise RequestError("only a checkpoint of this session's own model can be resumed")
            check_logits(asked.wanted, model, len(entry.ids))
            start = Start(layer, entry.place)
            planned = self.planner.plan(asked.wanted, asked.edits, start, model, entry.ids)
        wanted = asked.wanted
        job = Job(session, model, entry.ids, layer, wanted, shared, watch, *planned, ids_known=True)
        opening = self.opening(job, entry, asked, buffers)
        return job, self.loans.settling(job, self._work(job, opening, start))

    def place_of(self, entry: Entry, model: ServedModel) -> Place | None:
        """Where inside a layer a checkpoint is; None between two layers. Raises RequestError for one
        that is outside of them."""
        if not entry.place:
            return None
        place = self.named(entry.place, model)
        if not 0 <= place.zone < model.info.num_layers:
            raise RequestError(f"the checkpoint is at {entry.place}, outside of the layers")
        return place

    def opening(
        self,
        job: Job,
        entry: Entry,
        asked: Resume | Generate,
        buffers: Sequence[bytes | memoryview],
    ) -> Opening:
        """How *job* comes to what it starts with: a checkpoint with what was asked for done to it.

        Raises UnknownCheckpoint, EditError at once; the job uses the checkpoint from now on.
        """
        if asked.hidden is not None:
            check_hidden(asked.hidden, entry.body.tensor)
        if asked.edits or asked.hidden is not None:
            self.loans.read(job, asked.hidden, asked.edits)
        session = job.session
        sources = self.sources(session, asked.edits)
        rests = self.rests(entry, session)
        self.loans.hold(job, [entry, *sources.values(), *rests])
        opening = self._open(job, entry, asked, buffers, sources)
        return self._open_inside(job, entry, rests, opening) if entry.place else opening

    def rests(self, entry: Entry, session: EngineSession) -> list[Entry]:
        """What a checkpoint inside of a layer rests on, nearest first: what was handed in before it
        there, and the layer's input."""
        found: list[Entry] = []
        while entry.place and entry.base:
            entry = self.source(entry.base, session)
            found.append(entry)
        return found

    def _open(
        self,
        job: Job,
        entry: Entry,
        asked: Resume | Generate,
        buffers: Sequence[bytes | memoryview],
        sources: dict[int, Entry],
    ) -> Opening:
        unchanged: Entry | None = None
        if asked.hidden is not None:
            with job.watch.span("restore"):
                owner = job.session.owner
                hidden = self._keeping.see_sent(asked.hidden, buffers, owner)
                if isinstance(asked.hidden.where, Device):
                    job.ends.append(self._keeping.holds.reading(asked.hidden, owner))
        else:
            hidden = yield from self.loans.lend(job, entry)
            unchanged = entry
        if asked.edits:
            for source in sources.values():
                yield from self.loans.lend(job, source)
            with job.watch.span("edit"):
                change = self._edit(job.session, asked.edits, buffers, sources)
                hidden, unchanged = change(hidden.clone()), None
        return hidden, unchanged

    def _open_inside(
        self, job: Job, entry: Entry, rests: Sequence[Entry], opening: Opening
    ) -> Opening:
        """For a checkpoint inside a layer (or the tail, or before the layers): its value is handed
        in there, and what was before it, and the run starts with what flowed into that layer."""
        value, _ = yield from opening
        assert value is not None
        job.given = [Given(self.named(entry.place, job.model), value.clone())]
        for rest in rests:
            value = yield from self.loans.lend(job, rest)
            if not rest.place:
                return value, None
            job.given.insert(0, Given(self.named(rest.place, job.model), value.clone()))
        job.fresh = True
        return None, None

    def named(self, path: str, model: ServedModel) -> Place:
        """The place that a checkpoint inside of a layer is at."""
        (place,) = self.planner.atlas(model).find(path)
        assert isinstance(place, Place)
        return place

    def first_ahead(self, job: Job) -> int:
        """The first number of layers that a run in the midst of a forward has still to come to."""
        before = bool(job.place) and self.named(job.place, job.model).zone == BEFORE
        return job.layer if before else job.layer + 1

    def _edit(
        self,
        session: EngineSession,
        edits: tuple[Edit, ...],
        buffers: Sequence[bytes | memoryview],
        sources: dict[int, Entry],
    ) -> Change:
        """Makes *edits* on a value of the job's own. sources: must be resident when it is called."""
        return lambda hidden: editing.carry_out(
            self.ready(edits, hidden, buffers, session, sources), hidden
        )

    def edited(
        self,
        session: EngineSession,
        edits: tuple[Edit, ...],
        buffers: Sequence[bytes | memoryview],
        sources: dict[int, Entry],
        hidden: torch.Tensor,
    ) -> torch.Tensor:
        """*hidden*, the caller's own, with *edits* made on it. sources: resident."""
        return self._edit(session, edits, buffers, sources)(hidden)

    def ready(
        self,
        edits: tuple[Edit, ...],
        hidden: torch.Tensor,
        buffers: Sequence[bytes | memoryview],
        session: EngineSession,
        sources: dict[int, Entry],
    ) -> editing.Ready:
        """What *edits* do to *hidden*, checked and not done yet. sources: resident."""
        return editing.prepared(
            hidden,
            tuple(edit for edit in edits if not isinstance(edit, Skip)),
            lambda tensor: self._keeping.load_sent(tensor, buffers, session.owner),
            lambda number: self._keeping.hidden(sources[number]),
        )

    def sources(self, session: EngineSession, edits: tuple[Edit, ...]) -> dict[int, Entry]:
        """The checkpoints that *edits* take from."""
        numbers = [edit.source for edit in edits if isinstance(edit, Patch)]
        return {number: self.source(number, session) for number in numbers}

    def source(self, number: int, session: EngineSession) -> Entry:
        entry = self._keeping.find(number, session.owner)
        if entry.layer < 0:
            raise EditError(f"{number:#x} is not a checkpoint")
        return entry

    # ---- the work

    def _work(self, job: Job, opening: Opening | None, start: Start = FRESH) -> Turns:
        """All of a run: its layers, and the logits that are wanted.

        opening: gives the hidden state to start with; None: start at the embedding.
        """
        job.advance("start")
        if job.session.attached is not None:
            inside.attend(job, start)
        watch, first = job.watch, job.layer
        hidden: torch.Tensor | None = None
        unchanged: Entry | None = None
        if opening is not None:
            hidden, unchanged = yield from opening
        if hidden is not None and job.plan is None and job.stop_at == first:
            yield from self._stay(job, hidden, unchanged)
            return
        with watch.span("record"):
            recording = self.recordings.of(job.model, job.ids)
        if hidden is None and job.plan is not None:
            recording = yield from inside.recorded(job, recording, self.loans.keep_in_room)
        if hidden is None:
            hidden = recording.embedded  # which is kept: no layer may change it
            if job.edit is not None and job.stopped:
                raise EditError(
                    "edits are of what flows into the first layer: this run stops before; edit when it is resumed"
                )
            if job.edit is not None:
                for source in tuple(job.loans):
                    yield from self.loans.lend(job, source)
                with watch.span("edit"):
                    hidden = job.edit(hidden.clone())
        if not job.stopped:
            hidden = yield from self.through(job, hidden, recording, unchanged)
        if not job.stopped and (job.wanted.logits != "none" or _stops_behind(job)):
            yield None
            yield from self._take_logits(job, hidden, recording, lent=job.layer == first)
            yield from self.loans.keep_large_logits(job)
        yield from self.loans.until_done(job)
        job.advance("stop" if job.stopped else "finish")

    def _stay(self, job: Job, hidden: torch.Tensor, unchanged: Entry | None) -> Iterator[None]:
        """A run that stops where it begins: no layer runs. Unchanged, its checkpoint is of the same
        bytes."""
        yield from self._keep_if_wanted(job, hidden, unchanged)
        if unchanged is None:
            yield from self.loans.until_done(job)
        else:
            with job.watch.span("restore"):  # it may have been brought to the device just now
                while not unchanged.body.arrived:
                    yield
        job.stopped = True
        job.advance("stop")

    def _take_logits(
        self, job: Job, hidden: torch.Tensor, recording: Recording, *, lent: bool
    ) -> Turns:
        logits: torch.Tensor | None
        if job.plan is None:
            with job.watch.span("compute"):
                logits = job.model.stepper.tail(recording.ids, hidden, lent=lent)
        else:
            logits = yield from inside.tail(job, hidden, recording, self.loans.keep_in_room)
        if logits is not None and job.wanted.logits != "none":
            job.logits = logits if job.wanted.logits == "all" else logits[:, -1]

    def through(
        self,
        job: Job,
        hidden: torch.Tensor,
        recording: Recording,
        unchanged: Entry | None = None,
    ) -> Halting:
        """Layer by layer from `job.layer` to the stop or the end; yields before each layer.

        hidden: not to be changed. unchanged: the checkpoint that it is, where it is one.
        """
        if job.plan is not None:
            hidden = yield from inside.through(
                job, hidden.clone(), recording, self.loans.keep_in_room
            )
            return hidden
        stepper, first = job.model.stepper, job.layer
        job.passed(hidden)
        yield from self._keep_if_wanted(job, hidden, unchanged)
        while job.layer != (stepper.num_layers if job.stop_at is None else job.stop_at):
            yield None
            if job.session.attached is not None and job.can_halt:  # since this run began
                inside.attend(job)
                if job.plan is not None:
                    hidden = yield from inside.through(
                        job, hidden.clone(), recording, self.loans.keep_in_room, begun=True
                    )
                    return hidden
            with job.watch.span("compute"):
                hidden = stepper.step(job.layer, hidden, recording, lent=job.layer == first)
                job.layer += 1
            job.passed(hidden)
            yield from self._keep_if_wanted(job, hidden)
        job.stopped = job.stop_at is not None
        return hidden

    def _keep_if_wanted(
        self, job: Job, hidden: torch.Tensor, unchanged: Entry | None = None
    ) -> Iterator[None]:
        """unchanged: the checkpoint of this session that *hidden* is: then nothing is copied."""
        if job.layer != job.stop_at and job.layer not in job.save_at:
            return
        if unchanged is not None:
            job.kept.append(
                self.loans.lent(job, self._keeping.share(unchanged, job.id, job.midway(job.layer)))
            )
            return
        job.kept.append((yield from self.loans.keep_in_room(job, hidden, job.layer)))


def _stops_behind(job: Job) -> bool:
    """Is there anything to do behind the last layer, though no logits are wanted?"""
    return job.plan is not None and job.plan.concerns(job.model.stepper.num_layers)


def check_logits(wanted: Wanted, model: ServedModel, batch: int) -> None:
    """Raises RequestError where the top logits are more than there are, or than one frame carries."""
    if wanted.logits not in ("last", "all", "none", "top"):
        raise RequestError(f'logits "{wanted.logits}": "last", "all", "none" or a number')
    if wanted.logits == "top" and not 1 <= wanted.top <= model.info.vocab_size:
        raise RequestError(
            f"the top {wanted.top} logits: 1 to {model.info.vocab_size} can be asked for"
        )
    if wanted.logits == "top" and wanted.top * batch > MIB // 8:  # int64 ids
        raise RequestError(
            f"the top {wanted.top} logits of {batch} prompts: at most {MIB // 8 // batch} of each; "
            'ask for logits="last"'
        )


def check_hidden(given: Tensor, kept: Tensor) -> None:
    """Raises EditError unless *given* can stand in *kept*'s place."""
    if given.shape != kept.shape:
        raise EditError(f"hidden has shape {given.shape}, the checkpoint {kept.shape}")
    if given.dtype != kept.dtype:
        raise EditError(f"hidden is {given.dtype}, the checkpoint {kept.dtype}")
