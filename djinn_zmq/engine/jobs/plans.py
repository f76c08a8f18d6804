"""What a run does beside running: stops and saves inside layers, conditions, layers left out.

Made once from what was asked, and checked whole before anything runs. A run that asks for numbers
only has no plan, and takes the short way in `runs`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from djinn_zmq.engine.models import conditions
from djinn_zmq.engine.models.conditions import Moment, Test
from djinn_zmq.engine.models.loading import ServedModel
from djinn_zmq.engine.models.places import BEFORE, Atlas, Place
from djinn_zmq.errors import LayerError, StopError
from djinn_zmq.wire.edits import Edit, Skip
from djinn_zmq.wire.messages import Wanted
from djinn_zmq.wire.stops import ALL, Break, Stops

WATCHED_POSITIONS = 7  # of the prompt that shows which modules a model calls

Key = tuple[int, int]  # as `Place.key`: sorts places as a run reaches them


@dataclass(slots=True, eq=False)
class Watch:
    """A place where a run stops (where *test* holds; None: always), or saves and goes on."""

    place: Place | int
    test: Test | None
    stops: bool

    @property
    def key(self) -> Key:
        return (self.place, -1) if isinstance(self.place, int) else self.place.key


@dataclass(slots=True, eq=False)
class Plan:
    moment: Moment
    inside: dict[int, list[Watch]] = field(default_factory=dict)  # by zone, in the order reached
    between: dict[int, list[Test]] = field(default_factory=dict)  # by layers executed
    anywhere: list[Test] = field(default_factory=list)  # after any layer
    skips: frozenset[int] = frozenset()  # layers left out, counted from 0
    given: Place | None = None  # where the run starts, with a value to hand in there
    asked: object = None  # what a debugger's was made of

    def concerns(self, zone: int) -> bool:
        """Is there anything to do inside of *zone*?"""
        return zone in self.inside or (self.given is not None and self.given.zone == zone)


class Start(NamedTuple):
    """Where a run starts: after so many layers, or at a place inside one of them."""

    layer: int
    place: str = ""
    fresh: bool = False  # at the token ids
    step: int | None = None  # of a generation: more tokens and steps are to come
    again: bool = False  # a generation that goes on: it stopped here, and looks further
    last_step: int | None = None  # of a generation that begins


class Planned(NamedTuple):
    stop_at: int | None  # the layer after which it stops in any case
    save_at: tuple[int, ...]
    plan: Plan | None


class Planner:
    def __init__(self) -> None:
        self._atlases: dict[str, Atlas] = {}

    def atlas(self, model: ServedModel) -> Atlas:
        """Which modules *model* calls; seen once, in a forward of a few tokens."""
        name = model.info.name
        found = self._atlases.get(name)
        if found is None:
            long = min(WATCHED_POSITIONS, model.info.max_positions or WATCHED_POSITIONS)
            ids = torch.arange(long, device=model.device)[None] % model.info.vocab_size
            found = self._atlases[name] = Atlas(model.stepper, name, ids)
        return found

    def plan(
        self,
        wanted: Wanted,
        edits: Sequence[Edit],
        start: Start,
        model: ServedModel,
        ids: np.ndarray,
    ) -> Planned:
        """Raises LayerError, StopError for what is not there, lies behind, or is never reached."""
        skips = [edit for edit in edits if isinstance(edit, Skip)]
        stops = wanted.stop_at
        if not isinstance(stops, Stops):
            if not skips and not start.place:
                check_layers(stops, wanted.save_at, start.layer, model)
                return Planned(stops, wanted.save_at, None)
            stops = Stops(() if stops is None else (Break(stops, ()),), ())
        return _Planning(self, model, start, ids).made(stops, wanted.save_at, skips)

    def holds(
        self, breaks: Sequence[Break], start: Start, model: ServedModel, ids: np.ndarray
    ) -> Plan:
        """Where a debugger holds a run that has come to *start*: at each of *breaks* still ahead,
        one after another. Raises LayerError, StopError for what can never be."""
        return _Planning(self, model, start, ids).holds(tuple(breaks))


class _Planning:
    """One plan in the making."""

    def __init__(self, planner: Planner, model: ServedModel, start: Start, ids: np.ndarray) -> None:
        self._planner = planner
        self._model = model
        self._ids = ids
        self._layer = start.layer
        self._depth = model.info.num_layers
        self._plan = Plan(Moment(ids, start.step or 0))
        self._generates = start.step is not None
        self._again = start.again
        self._last_step = start.last_step
        self._from: Key = (BEFORE, -1) if start.fresh else (start.layer, -1)
        self._where = f"the checkpoint after layer {start.layer}"
        if start.place:
            (given,) = self._find(start.place)
            assert isinstance(given, Place)
            self._plan.given = given
            self._from = given.key
            self._where = f"the checkpoint at {start.place}"

    def made(self, stops: Stops, save_at: tuple[int, ...], skips: list[Skip]) -> Planned:
        plan = self._plan
        breaks = self._breaks(stops.breaks)
        certain = [watch for watch in breaks if watch.test is None]
        first = min(certain, key=lambda one: one.key, default=None)
        limit: Key = (self._depth + 1, 0) if first is None else first.key
        watches = [watch for watch in breaks if watch.key < limit]
        saves: list[int] = []
        every: tuple[int | str, ...] = (*save_at, *stops.saves)
        for path in every:
            for place in self._saved(path, limit):
                if isinstance(place, int):
                    saves.append(place)
                else:
                    watches.append(Watch(place, None, stops=False))
        stop_at = None
        if first is not None:
            if isinstance(first.place, int):
                stop_at = first.place
            else:
                watches.append(first)
        plan.skips = frozenset(self._skipped(skip, limit) for skip in skips)
        for watch in sorted(watches, key=lambda one: (one.key, one.stops)):
            if isinstance(watch.place, int):
                assert watch.test is not None
                plan.between.setdefault(watch.place, []).append(watch.test)
            elif watch.place.zone in plan.skips:
                raise StopError(f'"{watch.place.path}" is never reached: its layer is skipped')
            else:
                plan.inside.setdefault(watch.place.zone, []).append(watch)
        return Planned(stop_at, tuple(sorted(set(saves))), plan)

    def holds(self, asked: tuple[Break, ...]) -> Plan:
        plan = self._plan
        plan.given = None
        for watch in sorted(self._breaks(asked), key=lambda one: one.key):
            if isinstance(watch.place, int):
                plan.between.setdefault(watch.place, []).append(watch.test or _always)
            else:
                plan.inside.setdefault(watch.place.zone, []).append(watch)
        return plan

    def _breaks(self, asked: tuple[Break, ...]) -> list[Watch]:
        """Where it may stop. Of several stops, and of a module of every layer, those behind the
        start are passed over, so that the same breakpoints serve one resume after another."""
        found: list[Watch] = []
        for one in asked:
            test = None
            if one.when:
                test = conditions.ready(
                    one.when,
                    self._model,
                    self._ids,
                    generates=self._generates,
                    last_step=self._last_step,
                )
            if one.at == "":
                if test is None:
                    raise StopError("a Break with neither a place nor a condition")
                self._plan.anywhere.append(test)
                continue
            places = self._find(one.at)
            many = len(asked) > 1 or _relative(one.at) or self._again
            ahead = [place for place in places if self._ahead(place, strictly=many)]
            if not ahead and not many:
                raise LayerError(f"stop_at {one.at} lies behind {self._where}")
            found += [Watch(place, test, stops=True) for place in ahead]
        return found

    def _saved(self, path: int | str, limit: Key) -> Iterable[Place | int]:
        if path == ALL:
            every = [layer for layer in range(self._depth + 1) if _key(layer) <= limit]
            return [layer for layer in every if self._ahead(layer, self._again)]
        places = self._find(path)
        ahead = [place for place in places if self._ahead(place, _relative(path) or self._again)]
        reached = [place for place in ahead if _key(place) <= limit]
        if self._again:
            return reached
        if not ahead:
            raise LayerError(f"save_at {path} lies behind {self._where}")
        if not reached:
            raise LayerError(f"save_at {path} lies behind stop_at: it is never reached")
        return reached

    def _find(self, at: int | str) -> list[Place | int]:
        if isinstance(at, str):
            return self._planner.atlas(self._model).find(at)
        _check_layer(at, self._model)
        return [at]

    def _ahead(self, place: Place | int, strictly: bool) -> bool:
        key = _key(place)
        return key > self._from or (key == self._from and not strictly)

    def _skipped(self, skip: Skip, limit: Key) -> int:
        """The layer that *skip* leaves out, counted from 0."""
        layer, depth = skip.layer, self._depth
        if isinstance(layer, str):
            layer = self._planner.atlas(self._model).layer_of(layer)
        if not 1 <= layer <= depth:
            raise LayerError(f'Skip({layer}): "{self._model.info.name}" has layers 1 to {depth}')
        if (layer - 1, -1) < self._from:
            raise LayerError(f"Skip({layer}) lies behind {self._where}")
        if (layer - 1, -1) >= limit:
            raise LayerError(f"Skip({layer}) lies behind stop_at: it is never reached")
        return layer - 1


def check_layers(
    stop_at: int | None, save_at: tuple[int, ...], layer: int, model: ServedModel
) -> None:
    """Raises LayerError for a layer the model has not, or one that lies behind the start."""
    last = model.info.num_layers
    stop = last if stop_at is None else stop_at
    for what, asked in (("stop_at", stop), *(("save_at", save) for save in save_at)):
        _check_layer(asked, model)
        if asked < layer:
            raise LayerError(f"{what} {asked} lies behind the checkpoint at layer {layer}")
        if asked > stop:
            raise LayerError(f"save_at {asked} lies behind stop_at {stop}: it is never reached")


def _check_layer(asked: int, model: ServedModel) -> None:
    last = model.info.num_layers
    if not 0 <= asked <= last:
        raise LayerError(
            f'layer {asked} does not exist: "{model.info.name}" has {last} layers (0-{last})'
        )


def _always(value: torch.Tensor, moment: Moment) -> bool:
    return True


def _key(place: Place | int) -> Key:
    return (place, -1) if isinstance(place, int) else place.key


def _relative(at: int | str) -> bool:
    return isinstance(at, str) and at.startswith(".")
