"""The keys and values of a conversation's past, as immutable values that branches share.

    Past (10 positions) ── Past (12) ── Past (13)          each holds what its own positions added,
          └─────────────── Past (11)                       and refers to the past before them

transformers' own cache objects grow (or, the static ones, are written in place) as a forward goes
through its layers. So one is made for each way forward from a Past, and thrown away: `Working`. What
it comes to is cut out of it again where somebody keeps it. A past of one piece goes into a cache by
reference, a longer chain is put together as it goes in.

A static cache is copied into fresh buffers each time, never shared and rewound: its sliding layers
roll in place, and what a rewind leaves behind its end is masked by multiplying with zero, which a
NaN of another branch would survive. A dynamic cache copies as much at every step: it grows by `cat`.

Layers that are neither (a convolution's state) are small, and kept whole after each step.
"""

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import (
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticCache,
    StaticLayer,
    StaticSlidingWindowLayer,
)

_DYNAMIC = (DynamicLayer, DynamicSlidingWindowLayer)
_STATIC = (StaticLayer, StaticSlidingWindowLayer)


@dataclass(slots=True, eq=False)
class Account:
    """Bytes of keys and values that exist for one session, each counted once."""

    nbytes: int = 0


class Segment:
    """What one layer's cache holds of the positions [start, end): immutable.

    parts: by attribute of transformers' cache layer (and key, where that is a dict) a tensor; keys
    and values: (batch, heads, positions, head_dim). rest: the layer's other attributes, where it is
    kept whole.
    """

    __slots__ = ("__weakref__", "_account", "end", "nbytes", "parts", "rest", "start")

    def __init__(
        self,
        start: int,
        end: int,
        parts: dict[tuple[str, Any], torch.Tensor],
        rest: dict[str, Any] | None,
        account: Account,
    ) -> None:
        self.start, self.end = start, end
        self.parts = parts
        self.rest = rest
        self.nbytes = sum(part.nbytes for part in parts.values())
        self._account = account
        account.nbytes += self.nbytes

    def __del__(self) -> None:
        self._account.nbytes -= self.nbytes


class Past:
    """Keys and values of *length* positions: a node of a chain that branches share."""

    __slots__ = ("before", "length", "segments")

    def __init__(self, before: "Past | None", segments: Sequence[Segment], length: int) -> None:
        self.before = before
        self.segments = tuple(segments)  # one a layer
        self.length = length

    def chain(self) -> "Iterator[Past]":
        """This past and all before it, newest first."""
        past: Past | None = self
        while past is not None:
            yield past
            past = past.before


@dataclass(slots=True, eq=False)
class Caches:
    """Makes the cache objects of one model.

    name: of the argument that takes the cache; "" where the model's forward has none.
    """

    model: nn.Module
    name: str = ""
    _config: Any = field(init=False)

    def __post_init__(self) -> None:
        takes = inspect.signature(self.model.forward).parameters
        self.name = next((name for name in ("cache", "past_key_values") if name in takes), "")
        self._config = self.model.config.get_text_config(decoder=True)  # type: ignore[operator,union-attr]

    @property
    def position_nbytes(self) -> int:
        """About what the keys and values of one position take in all layers; 0: the config does not
        say."""
        config = self._config
        heads = getattr(config, "num_attention_heads", None)
        if not isinstance(heads, int):
            return 0
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        of_keys = getattr(config, "num_key_value_heads", None) or heads
        itemsize: int = self.model.dtype.itemsize  # type: ignore[union-attr, operator]
        return 2 * config.num_hidden_layers * of_keys * size * itemsize

    def blank(self, static: int) -> Any:
        """static: positions of a static cache; 0: a dynamic one."""
        if static:
            return StaticCache(config=self._config, max_cache_len=static)
        return DynamicCache(config=self._config)

    @staticmethod
    def over_past(cache: Any) -> bool:
        """Does attention through *cache* read more keys than it has queries?"""
        return any(
            type(layer) in _STATIC or getattr(layer, "is_initialized", False)
            for layer in cache.layers
        )

    def nothing(self, account: Account) -> Past:
        """The past of a conversation that has not begun."""
        layers = self.blank(0).layers
        return Past(None, [Segment(0, 0, {}, None, account) for _ in layers], 0)

    def open(
        self, past: Past, static: int, account: Account, below: Sequence[Segment] = ()
    ) -> "Working":
        """A cache to go on from *past* with.

        below: what the layers that a forward has been through already have added to it. Nothing is
        read from these layers any more, and their past is not put together.
        """
        cache = self.blank(static)
        for index, layer in enumerate(cache.layers):
            _fill(layer, past, index, hollow=index < len(below))
        return Working(cache, past, account, list(below))


class Working:
    """A cache under way: forwards go through it, `past` is what is known of it as a value."""

    def __init__(self, cache: Any, past: Past, account: Account, below: list[Segment]) -> None:
        self.cache = cache
        self.past = past
        self.length = past.length  # positions, without those of the forward under way
        self.hollow = bool(below)  # lower layers hold nothing: good for one forward only
        self._account = account
        self._taken = below
        self._count = 0

    @property
    def taken(self) -> tuple[Segment, ...]:
        """What has been cut of the forward under way, for those who stopped in it."""
        return tuple(self._taken)

    def spread(self, count: int) -> None:
        """Make it the cache of *count* rows, which go on from one past side by side. It comes to no
        value then: it is thrown away behind the forward."""
        for index, layer in enumerate(self.cache.layers):
            if type(layer) in _DYNAMIC:
                if layer.is_initialized:  # it grows by `cat`: until then the rows share one copy
                    layer.keys = layer.keys.expand(count, -1, -1, -1)
                    layer.values = layer.values.expand(count, -1, -1, -1)
            elif index >= len(self._taken):  # below that nothing is read
                for name, key in self.past.segments[index].parts:
                    held = getattr(layer, name)
                    data = held if key is None else held[key]
                    if data.ndim > 1:  # else it is a count
                        data = data.repeat(count, *[1] * (data.ndim - 1))
                    if key is None:
                        setattr(layer, name, data)
                    else:
                        held[key] = data

    def begin(self, count: int) -> None:
        """A forward of *count* positions comes, or the rest of one."""
        self._count = count

    def below(self, layer: int) -> tuple[Segment, ...]:
        """What the forward under way has added to the layers below *layer*, all executed.

        `commit` must have been called before it began.
        """
        end = self.length + self._count
        for index in range(len(self._taken), layer):
            self._taken.append(self._cut(index, self.past.length, end, end))
        return tuple(self._taken[:layer])

    def rewinder(self, index: int) -> Callable[[], None]:
        """Puts back what a layer of the cache holds now, so that the model's layer can run again."""
        if not 0 <= index < len(self.cache.layers):
            return lambda: None
        layer = self.cache.layers[index]
        grows = type(layer) in _DYNAMIC  # by new tensors; others write in place

        def copied(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return value if grows else value.clone()
            return {k: copied(v) for k, v in value.items()} if isinstance(value, dict) else value

        before = {name: copied(value) for name, value in vars(layer).items()}

        def rewind() -> None:
            for name in vars(layer).keys() - before.keys():
                delattr(layer, name)
            for name, value in before.items():
                setattr(layer, name, copied(value))

        return rewind

    def finish(self) -> None:
        """The forward has been through all layers."""
        added = self.below(len(self.cache.layers)) if self._taken else ()
        self.length += self._count
        if added:
            self.past = Past(self.past, added, self.length)
            self._taken = []

    def commit(self) -> Past:
        """The past as it is between two forwards."""
        if self.length > self.past.length:
            segments = [
                self._cut(index, self.past.length, self.length, self.length)
                for index in range(len(self.cache.layers))
            ]
            self.past = Past(self.past, segments, self.length)
        return self.past

    def whole(self, length: int) -> Past:
        """The past between two forwards, *length* positions, as one piece that shares nothing."""
        layers = range(len(self.cache.layers))
        return Past(None, [self._cut(index, 0, length, length) for index in layers], length)

    def _cut(self, index: int, start: int, end: int, length: int) -> Segment:
        """Positions [start, end) of a layer that has had *length*, as far as it still holds them."""
        layer = self.cache.layers[index]
        if type(layer) not in (*_DYNAMIC, *_STATIC):
            return _whole(layer, end, self._account)
        first = length - _held(layer, length)
        start = max(start, first)
        parts = {}
        for name in ("keys", "values"):
            data = getattr(layer, name)[:, :, start - first : end - first]
            own = data.untyped_storage().nbytes() == data.nbytes and type(layer) in _DYNAMIC
            parts[name, None] = data if own else data.clone()  # else it would keep more alive
        return Segment(start, end, parts, None, self._account)


def _held(layer: Any, length: int) -> int:
    """How many of its last positions a layer of keys and values holds after *length*."""
    if type(layer) is DynamicSlidingWindowLayer:
        return min(length, layer.sliding_window - 1)
    return length if type(layer) is DynamicLayer else min(length, layer.max_cache_len)


def _whole(layer: Any, end: int, account: Account) -> Segment:
    parts, rest = {}, {}
    for name, value in vars(layer).items():
        if isinstance(value, torch.Tensor):
            parts[name, None] = value.clone()
        elif isinstance(value, dict) and any(isinstance(v, torch.Tensor) for v in value.values()):
            parts |= {(name, key): item.clone() for key, item in value.items()}
        else:
            rest[name] = copy.copy(value)
    return Segment(0, end, parts, rest, account)


def _fill(layer: Any, past: Past, index: int, *, hollow: bool) -> None:
    """Put what *past* has of a layer into a blank cache layer."""
    if not past.length:
        return
    newest = past.segments[index]
    if newest.rest is not None:
        for name, value in newest.rest.items():
            setattr(layer, name, copy.copy(value))
        for (name, key), part in newest.parts.items():
            if key is None:
                setattr(layer, name, part.clone())
            else:
                getattr(layer, name)[key] = part.clone()
        return
    held = _held(layer, past.length)
    keys, values = (
        _gathered(past, index, name, past.length - held, hollow) for name in ("keys", "values")
    )
    if type(layer) in _DYNAMIC:
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
    elif hollow:
        layer.cumulative_length = layer.cumulative_length.to(keys.device)
        layer.is_initialized = True
    else:
        layer.lazy_initialization(keys, values)
        layer.keys[:, :, :held] = keys
        layer.values[:, :, :held] = values
    if type(layer) is DynamicSlidingWindowLayer:
        layer.cumulative_length = past.length
    elif type(layer) in _STATIC:
        layer.cumulative_length.fill_(past.length)
        if type(layer) is StaticSlidingWindowLayer:
            layer.cumulative_length_int = past.length


def _gathered(past: Past, index: int, name: str, first: int, hollow: bool) -> torch.Tensor:
    """Positions from *first* on: (batch, heads, positions, head_dim)."""
    if hollow:
        shape = list(past.segments[index].parts[name, None].shape)
        shape[2] = past.length - first
        return past.segments[index].parts[name, None].new_zeros(()).expand(shape)
    pieces = []
    for node in past.chain():
        segment = node.segments[index]
        if segment.parts:
            pieces.append(segment.parts[name, None][:, :, max(0, first - segment.start) :])
        if segment.start <= first:
            break
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces[::-1], dim=2)
