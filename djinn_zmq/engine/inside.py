"""Carrying out a plan: the same layers, with a hand inside the one that is concerned.

    stop    the layer runs with a hook on the module; where it is reached its value is taken, and
            the rest of the layer does not run
    resume  the layer runs again from its own input, which was kept too; where the module is
            reached, the value handed in takes its place

So both cost one layer, whatever its depth. What lies before the module is computed again and is the
same bits; a value handed in unchanged changes none. Before the first layer and behind the last the
same is done to the model's own preamble and tail.
"""

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from djinn_zmq.engine.conditions import Moment
from djinn_zmq.engine.jobs import Job
from djinn_zmq.engine.places import BEFORE, Place, input_of, output_of
from djinn_zmq.engine.plans import Plan, Watch
from djinn_zmq.engine.stepping import Recording, same_bits
from djinn_zmq.errors import EditError, RunError, StopError
from djinn_zmq.wire.messages import Kept

Keep = Callable[..., Kept]  # (job, data, layer, place=, base=)


class _Stopped(Exception):
    """Ends a layer's forward at the place where the run stops."""


class _Taken(NamedTuple):
    place: Place
    value: torch.Tensor


def recorded(
    job: Job, plain: Recording, keep: Keep, record: Callable[[], Recording] | None = None
) -> Recording:
    """The recording of *job*'s prompt, with a hand on what runs before the layers.

    plain: the recording without. record: how it was made, if not of the prompt alone. `job.stopped` says afterwards whether the run stopped there.
    """
    plan = _plan_of(job)
    if not plan.concerns(BEFORE):
        return plain
    stepper, given = job.model.stepper, plan.given
    made = _Zone(job, BEFORE, keep).run(None, record or (lambda: stepper.record(plain.ids)))
    if made is None:
        return plain
    if given is not None and not _same_arguments(plain, made):
        # Checkpoints further on could not be resumed exactly.
        raise EditError(
            f"{given.path}: this model's layers are given more than the hidden state that depends "
            "on it, so it can be looked at but not edited"
        )
    recording: Recording = made
    return recording


def through(
    job: Job, hidden: torch.Tensor, recording: Recording, keep: Keep
) -> Generator[None, None, torch.Tensor]:
    """Layer by layer from `job.layer` to the stop or the end; yields before each layer.

    hidden: (batch, positions, hidden_size), the job's own. `job.stopped` says afterwards whether
    the run stopped.
    """
    plan, stepper = _plan_of(job), job.model.stepper
    if plan.given is None:
        _between(job, hidden, keep, arrived=job.fresh)
    while not job.stopped and job.layer != stepper.num_layers:
        yield
        index = job.layer
        if index not in plan.skips:
            with job.watch.span("compute"):
                if plan.concerns(index):
                    hidden = _hooked_layer(job, hidden, recording, keep)
                else:
                    hidden = stepper.step(index, hidden, recording)
        if not job.stopped:
            job.layer += 1
            _between(job, hidden, keep, arrived=True)
    return hidden


def _hooked_layer(job: Job, hidden: torch.Tensor, recording: Recording, keep: Keep) -> torch.Tensor:
    stepper, index = job.model.stepper, job.layer
    base = hidden.clone()  # some layers write into what they are given
    out = _Zone(job, index, keep).run(base, lambda: stepper.step(index, hidden, recording))
    return base if out is None else out


def tail(
    job: Job, hidden: torch.Tensor, recording: Recording, keep: Keep, *, last: bool = False
) -> torch.Tensor | None:
    """logits (batch, positions, vocab), or the last position's; None where the run stopped on the
    way to them."""
    plan, stepper = _plan_of(job), job.model.stepper
    if plan.concerns(stepper.num_layers):
        zone, base = _Zone(job, stepper.num_layers, keep), hidden.clone()
        # The model's own way: the short one calls fewer modules.
        return zone.run(base, lambda: stepper.own_tail(recording.ids, hidden, last=last))
    return stepper.tail(recording.ids, hidden, last=last)


def handed_in(
    job: Job, place: Place, value: torch.Tensor, compute: Callable[[], torch.Tensor]
) -> torch.Tensor:
    """*compute*, which runs the layer of *place*, with *value* handed in there."""
    job.plan, job.given = Plan(Moment(job.ids), given=place), value
    out: torch.Tensor = _Zone(job, place.zone, _keeps_nothing).run(None, compute)
    return out


def _keeps_nothing(*_: Any, **__: Any) -> Kept:
    raise AssertionError("nothing is taken where a value is only handed in")


def _plan_of(job: Job) -> Plan:
    assert job.plan is not None
    plan: Plan = job.plan
    return plan


def _between(job: Job, hidden: torch.Tensor, keep: Keep, *, arrived: bool) -> None:
    """Save and stop between two layers. arrived: a layer, or the embedding, has just run."""
    plan = _plan_of(job)
    tests = plan.between.get(job.layer, []) + (plan.anywhere if arrived else [])
    job.stopped = job.layer == job.stop_at or any(test(hidden, plan.moment) for test in tests)
    if job.stopped or job.layer in job.save_at:
        with job.watch.span("copy"):
            job.kept.append(keep(job, hidden, job.layer))


class _Zone:
    """One layer, or what comes before or behind them all, run with hooks in it."""

    def __init__(self, job: Job, zone: int, keep: Keep) -> None:
        self._job = job
        self._plan = _plan_of(job)
        self._zone = zone
        self._keep = keep
        self._taken: list[_Taken] = []

    def run(self, base: torch.Tensor | None, compute: Callable[[], Any]) -> Any:
        """What *compute* gives; None where the run stopped in it, which `job.stopped` then says.

        base: the input of it all, kept beside what the hooks take.
        """
        out = None
        try:
            with self._hooks() as missing:
                out = compute()
                if missing:
                    raise RunError(f"{', '.join(sorted(missing))}: not called for this prompt")
        except _Stopped:
            self._job.stopped = True
        if self._taken:
            self._keep_taken(base)
        return out

    def _keep_taken(self, base: torch.Tensor | None) -> None:
        job, base_id = self._job, 0
        if base is not None:
            kept = self._keep(job, base, job.layer)
            job.kept.append(kept)
            base_id = kept.id
        for place, value in self._taken:
            job.kept.append(self._keep(job, value, job.layer, place=place.path, base=base_id))

    # ---- hooks

    @contextmanager
    def _hooks(self) -> Iterator[set[str]]:
        """Hands at all places of the zone, in the order they are reached; gives those not reached
        yet."""
        given, zone = self._plan.given, self._zone
        watches = list(self._plan.inside.get(zone, ()))
        missing = {watch.place.path for watch in watches if isinstance(watch.place, Place)}
        handles = []
        try:
            if given is not None and given.zone == zone:
                missing.add(given.path)
                handles.append(self._hook(given, missing, self._hand_in))
            for watch in watches:
                assert isinstance(watch.place, Place)
                handles.append(self._hook(watch.place, missing, self._taker(watch)))
            yield missing
        finally:
            for handle in handles:
                handle.remove()
            if given is not None and given.zone == zone:
                self._plan.given = None  # handed in: from here on the run is like any other

    def _hook(
        self,
        place: Place,
        missing: set[str],
        hand: Callable[[Place, torch.Tensor], torch.Tensor | None],
    ) -> Any:
        """hand: is shown the value, and may give another for it."""
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

    def _hand_in(self, place: Place, value: torch.Tensor) -> torch.Tensor:
        edited = self._job.given
        assert edited is not None
        if edited.numel() != value.numel() or edited.dtype != value.dtype:
            raise StopError(
                f"{place.path}: a value of shape {tuple(edited.shape)} and {edited.dtype} in the "
                f"place of {tuple(value.shape)} and {value.dtype}"
            )
        return _laid_out_as(value, edited.reshape(value.shape))

    def _taker(self, watch: Watch) -> Callable[..., None]:
        def take(place: Place, value: torch.Tensor) -> None:
            seen = apart(value, place)
            if watch.test is not None and not watch.test(seen, self._plan.moment):
                return
            self._taken.append(_Taken(place, seen.clone()))  # it may be written into from here on
            if watch.stops:
                raise _Stopped

        return take


def apart(value: torch.Tensor, place: Place) -> torch.Tensor:
    """*value* with its heads apart, where the place means heads: (…, heads, head_dim)."""
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


def _same_arguments(one: Recording, other: Recording) -> bool:
    for (args, kwargs), (args_too, kwargs_too) in zip(one.arguments, other.arguments, strict=True):
        if kwargs.keys() != kwargs_too.keys() or len(args) != len(args_too):
            return False
        pairs = [*zip(args, args_too, strict=True), *((kwargs[k], kwargs_too[k]) for k in kwargs)]
        if not all(_same(*pair) for pair in pairs):
            return False
    return True


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and same_bits(one, other)
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(_same, one, other))
    return True  # numbers, flags and None come from the configuration
