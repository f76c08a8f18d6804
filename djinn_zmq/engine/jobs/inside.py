"""Carrying out a plan: the same layers, with a hand inside the one that is concerned.

    stop    the layer runs with a hook on the module; where it is reached its value is taken, and
            the rest of the layer does not run
    resume  the layer runs again from its own input, which was kept too; where the module is
            reached, the value handed in takes its place
    hold    both: a debugger stops the layer, and it runs again with the value let go

So each costs one layer, whatever its depth. What lies before the module is computed again and is the
same bits; a value handed in unchanged changes none. Before the first layer and behind the last the
same is done to the model's own preamble and tail.

A value rests on what was handed in before it in the same layer, and on the layer's input: these are
kept with it, each the base of the next.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from djinn_zmq.engine.jobs.job import Given, Halt, Halting, Job
from djinn_zmq.engine.jobs.plans import Key, Plan, Start, Watch
from djinn_zmq.engine.models.conditions import Moment
from djinn_zmq.engine.models.places import BEFORE, Place, input_of, output_of
from djinn_zmq.engine.models.stepping import Recording
from djinn_zmq.errors import EditError, RunError, StopError
from djinn_zmq.wire.messages import Kept

Keep = Callable[..., Generator[None, None, Kept]]  # (job, data, layer, place=, base=)
Tail = Callable[[torch.Tensor], Any]  # the last layer's output → what comes of it
FIRST: Key = (BEFORE, -1)


class _Stopped(Exception):
    """Ends a layer's forward at the place where the run stops."""


class _Held(Exception):
    """Ends a layer's forward at the place where a debugger holds the run."""


class _Taken(NamedTuple):
    place: Place
    value: torch.Tensor


def attend(job: Job, start: Start | None = None) -> None:
    """Look where a debugger holds *job*, which has come to *start*, by default to `job.layer`."""
    attached = job.session.attached
    if attached is None or not job.can_halt:
        job.held = None
        return
    start = start or Start(job.layer)
    job.held = attached.plan(job, start._replace(step=job.step_now or 0, again=True), job.held)
    if job.held is not None and job.plan is None:
        job.plan = Plan(Moment(job.ids, job.step_now or 0))


def recorded(
    job: Job, plain: Recording, keep: Keep, record: Callable[[], Recording] | None = None
) -> Generator[Halt | None, None, Recording]:
    """The recording of *job*'s prompt, with a hand on what runs before the layers.

    plain: the recording without. record: how it was made, if not of the prompt alone. `job.stopped`
    says afterwards whether the run stopped there.
    """
    plan = _plan_of(job)
    if not _concerns(job, BEFORE):
        return plain
    stepper, given = job.model.stepper, plan.given
    zone = _Zone(job, BEFORE, keep)
    made = yield from zone.run(None, record or (lambda: stepper.record(plain.ids)))
    if made is None:
        return plain
    if given is not None and not plain.same_arguments(made):
        # Checkpoints further on could not be resumed exactly.
        raise EditError(
            f"{given.path}: this model's layers are given more than the hidden state that depends "
            "on it, so it can be looked at but not edited"
        )
    recording: Recording = made
    return recording


def through(
    job: Job, hidden: torch.Tensor, recording: Recording, keep: Keep, *, begun: bool = False
) -> Halting:
    """Layer by layer from `job.layer` to the stop or the end; yields before each layer.

    hidden: (batch, positions, hidden_size), the job's own. begun: what is to be done with it before
    the next layer has been done. `job.stopped` says afterwards whether the run stopped.
    """
    plan, stepper = _plan_of(job), job.model.stepper
    if plan.given is None and not begun:
        hidden = yield from _between(job, hidden, keep, arrived=job.fresh)
        job.passed(hidden)
    while not job.stopped and job.layer != stepper.num_layers:
        yield None
        attend(job)
        index = job.layer
        if index not in plan.skips:
            if _concerns(job, index):
                hidden = yield from _hooked_layer(job, hidden, recording, keep)
            else:
                with job.watch.span("compute"):
                    hidden = stepper.step(index, hidden, recording)
        if not job.stopped:
            job.layer += 1
            hidden = yield from _between(job, hidden, keep, arrived=True)
            job.passed(hidden)
    return hidden


def _hooked_layer(job: Job, hidden: torch.Tensor, recording: Recording, keep: Keep) -> Halting:
    stepper, index = job.model.stepper, job.layer

    def compute() -> torch.Tensor:
        with job.watch.span("compute"):  # of a copy: some layers write into what they are given
            return stepper.step(index, hidden.clone(), recording)

    out = yield from _Zone(job, index, keep).run(hidden, compute)
    return hidden if out is None else out


def tail(
    job: Job,
    hidden: torch.Tensor,
    recording: Recording,
    keep: Keep,
    *,
    last: bool = False,
    own: Tail | None = None,
) -> Generator[Halt | None, None, Any]:
    """logits (batch, positions, vocab), or the last position's; None where the run stopped on the
    way to them. own: gives something else, by calling the model."""
    stepper = job.model.stepper
    attend(job)
    if _concerns(job, stepper.num_layers):
        zone = _Zone(job, stepper.num_layers, keep)

        def compute() -> torch.Tensor:
            with job.watch.span(
                "compute"
            ):  # the model's own way: the short one calls fewer modules
                if own is not None:
                    return own(hidden.clone())
                return stepper.own_tail(recording.ids, hidden.clone(), last=last)

        return (yield from zone.run(hidden, compute))
    with job.watch.span("compute"):
        return own(hidden) if own is not None else stepper.tail(recording.ids, hidden, last=last)


def handed_in(job: Job, given: Sequence[Given], compute: Callable[[], torch.Tensor]) -> Any:
    """*compute*, which runs a layer, with the values *given* handed in where it reaches them."""
    last = given[-1].place
    assert last is not None
    job.plan, job.given = Plan(Moment(job.ids), given=last), list(given)
    return _Zone(job, last.zone, _keeps_nothing).once(compute)


def _keeps_nothing(*_: Any, **__: Any) -> Generator[None, None, Kept]:
    raise AssertionError("nothing is taken where a value is only handed in")


def _plan_of(job: Job) -> Plan:
    assert job.plan is not None
    plan: Plan = job.plan
    return plan


def _concerns(job: Job, zone: int) -> bool:
    held = job.held
    return _plan_of(job).concerns(zone) or (held is not None and held.concerns(zone))


def _between(job: Job, hidden: torch.Tensor, keep: Keep, *, arrived: bool) -> Halting:
    """Hold, save and stop between two layers. arrived: a layer, or the embedding, has just run."""
    plan, held = _plan_of(job), job.held
    if held is not None and job.session.attached is not None:
        tests = held.between.get(job.layer, []) + (held.anywhere if arrived else [])
        if any(test(hidden, held.moment) for test in tests):
            hidden = yield from job.session.attached.halt(job, hidden, None, ())
    tests = plan.between.get(job.layer, []) + (plan.anywhere if arrived else [])
    job.stopped = job.layer == job.stop_at or any(test(hidden, plan.moment) for test in tests)
    if job.stopped or job.layer in job.save_at:
        job.kept.append((yield from keep(job, hidden, job.layer)))
    return hidden


class _Zone:
    """One layer, or what comes before or behind them all, run with hooks in it."""

    def __init__(self, job: Job, zone: int, keep: Keep) -> None:
        self._job = job
        self._plan = _plan_of(job)
        self._zone = zone
        self._keep = keep
        start = self._plan.given
        starts = start is not None and start.zone == zone
        self._given = list(job.given) if starts else []
        self._reached: Key = (zone, -1)  # by the debugger's holds
        self._taken: list[_Taken] = []
        self._caught: _Taken | None = None

    def run(
        self, base: torch.Tensor | None, compute: Callable[[], Any]
    ) -> Generator[Halt | None, None, Any]:
        """What *compute* gives; None where the run stopped in it, which `job.stopped` then says.

        base: the input of it all, kept beside what the hooks take. *compute* runs again after each
        hold of a debugger's.
        """
        rewind = self._job.rewinder(self._zone) if self._job.held is not None else None
        while True:
            try:
                out = self.once(compute)
                break
            except _Held:
                assert rewind is not None
                rewind()
                yield from self._hold(base)
        if self._given:
            self._plan.given = None  # handed in: from here on the run is like any other
        if self._taken:
            yield from self._keep_taken(base)
        return out

    def once(self, compute: Callable[[], Any]) -> Any:
        self._taken = []
        try:
            with self._hooks() as missing:
                out = compute()
                if missing:
                    raise RunError(f"{', '.join(sorted(missing))}: not called for this prompt")
        except _Stopped:
            self._job.stopped = True
            return None
        return out

    def _hold(self, base: torch.Tensor | None) -> Generator[Halt | None, None, None]:
        job, caught = self._job, self._caught
        assert caught is not None
        self._reached, value = caught.place.key, caught.value
        attached = job.session.attached
        if attached is not None:
            rests = [Given(None, base)] if base is not None else []
            value = yield from attached.halt(job, value, caught.place, [*rests, *self._given])
        self._given.append(Given(caught.place, value))
        attend(job, Start(job.layer, caught.place.path))

    def _keep_taken(self, base: torch.Tensor | None) -> Iterator[None]:
        job = self._job
        rests = [Given(None, base)] if base is not None else []
        base_id = yield from keep_rests(job, [*rests, *self._given], self._keep, job.kept)
        for place, value in self._taken:
            job.kept.append(
                (yield from self._keep(job, value, job.layer, place=place.path, base=base_id))
            )

    # ---- hooks

    @contextmanager
    def _hooks(self) -> Iterator[set[str]]:
        """Hands at all places of the zone, in the order they are reached; gives those not reached
        yet."""
        zone, held = self._zone, self._job.held
        watches = list(self._plan.inside.get(zone, ()))
        missing = {watch.place.path for watch in watches if isinstance(watch.place, Place)}
        handles = []
        try:
            for place, value in self._given:
                assert place is not None
                missing.add(place.path)
                handles.append(self._hook(place, missing, self._handing_in(value)))
            # Before the run's own: what a debugger lets go is what the run saves and stops with.
            for watch in held.inside.get(zone, ()) if held is not None else ():
                if watch.key > self._reached:
                    handles.append(self._hook(watch.place, missing, self._catcher(watch)))
            for watch in watches:
                handles.append(self._hook(watch.place, missing, self._taker(watch)))
            yield missing
        finally:
            for handle in handles:
                handle.remove()

    def _hook(
        self,
        place: Place | int,
        missing: set[str],
        hand: Callable[[Place, torch.Tensor], torch.Tensor | None],
    ) -> Any:
        """hand: is shown the value, and may give another for it."""
        assert isinstance(place, Place)
        if place.side == "input":

            def before(module: Any, args: Any, kwargs: Any) -> Any:
                new = hand(place, input_of(args, kwargs))
                missing.discard(place.path)
                return None if new is None else _with_input(args, kwargs, new)

            return place.module.register_forward_pre_hook(before, with_kwargs=True)

        def after(module: Any, args: Any, out: Any) -> Any:
            new = hand(place, output_of(out))
            missing.discard(place.path)
            if new is None:
                return None
            return (new, *out[1:]) if isinstance(out, tuple) else new

        return place.module.register_forward_hook(after)

    def _handing_in(self, edited: torch.Tensor) -> Callable[..., torch.Tensor]:
        def hand_in(place: Place, value: torch.Tensor) -> torch.Tensor:
            if edited.numel() != value.numel() or edited.dtype != value.dtype:
                raise StopError(
                    f"{place.path}: a value of shape {tuple(edited.shape)} and {edited.dtype} in the "
                    f"place of {tuple(value.shape)} and {value.dtype}"
                )
            return _laid_out_as(value, edited.reshape(value.shape))

        return hand_in

    def _taker(self, watch: Watch) -> Callable[..., None]:
        def take(place: Place, value: torch.Tensor) -> None:
            seen = apart(value, place)
            if watch.test is not None and not watch.test(seen, self._plan.moment):
                return
            if all(one.place.path != place.path for one in self._taken):  # asked for more than once
                # A copy: it may be written into from here on.
                self._taken.append(_Taken(place, seen.clone()))
            if watch.stops:
                raise _Stopped

        return take

    def _catcher(self, watch: Watch) -> Callable[..., None]:
        def catch(place: Place, value: torch.Tensor) -> None:
            held, seen = self._job.held, apart(value, place)
            if held is None or (watch.test is not None and not watch.test(seen, held.moment)):
                return
            self._caught = _Taken(place, seen.clone())
            raise _Held

        return catch


def keep_rests(
    job: Job, rests: Sequence[Given], keep: Keep, kept: list[Kept]
) -> Generator[None, None, int]:
    """Keep what a value inside of a layer rests on, each the base of the next; gives the last's
    number, 0 where there is nothing."""
    base = 0
    for place, value in rests:
        path = "" if place is None else place.path
        one = yield from keep(job, value, job.layer, place=path, base=base)
        kept.append(one)
        base = one.id
    return base


def apart(value: torch.Tensor, place: Place) -> torch.Tensor:
    """*value*, as its module has it, with its heads apart where the place means heads: (…, heads, head_dim)."""
    if not place.heads:
        return value
    return value.reshape(*value.shape[:-1], place.heads, value.shape[-1] // place.heads)


def _laid_out_as(value: torch.Tensor, data: torch.Tensor) -> torch.Tensor:
    """*data* in a tensor with the strides of *value*: kernels may round otherwise for others."""
    strides = value.stride()
    if 0 in strides:  # expanded: one number in many places, which *data* need not be
        return data
    out = torch.empty_strided(value.shape, strides, dtype=value.dtype, device=value.device)
    return out.copy_(data)


def _with_input(
    args: tuple[Any, ...], kwargs: dict[str, Any], new: torch.Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args:
        return (new, *args[1:]), kwargs
    return args, {**kwargs, next(iter(kwargs)): new}
