"""A cache that is elsewhere: transformers' cache object in a program, the keys and values on the server.

It names a past there. What generation does to a cache (other rows for beams, fewer positions after a
wrong guess) is noted, and done on the server with the next forward. Whatever would have to hand out keys
and values raises NotServed.
"""

from typing import Any, Self

import numpy as np
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from djinn_zmq.client.forwards import Change, Past
from djinn_zmq.errors import NotServed, RequestError
from djinn_zmq.hf.tensors import as_tensor, to_numpy, whole
from djinn_zmq.settings import counted
from djinn_zmq.wire.forwards import Crop, Repeat
from djinn_zmq.wire.messages import IDS_LIMIT


class RemoteCache(DynamicCache):
    """Made by a RemoteCausalLM's forward, or out of an empty DynamicCache that it is given."""

    session: int  # of the model that made it; 0: of none yet

    def __init__(self) -> None:
        raise NotServed("a RemoteCache is made by a served model, out of a DynamicCache")

    @classmethod
    def adopt(cls, cache: Any, config: Any) -> "RemoteCache":
        """*cache* itself, which is one of these from now on. Raises NotServed for what cannot be.

        A program goes on with the object it gave, so another one would not do.
        """
        if type(cache) is not DynamicCache:
            raise NotServed(
                f"a {type(cache).__name__} as cache: the keys and values of a served model stay on the "
                "server, in a DynamicCache's way; give a new DynamicCache or none"
            )
        if cache.get_seq_length():
            raise NotServed(
                "a DynamicCache with keys and values in it: those of a served model are on the server; "
                "give a new DynamicCache or none"
            )
        if getattr(cache, "offloading", False):
            raise NotServed("an offloading cache: the keys and values are on the server")
        own = DynamicCache(config=config)
        kinds = tuple(type(layer) for layer in own.layers)
        given = tuple(type(layer) for layer in cache.layers) or (DynamicLayer,) * len(kinds)
        if given != kinds:
            raise NotServed(
                "a cache with other layers than the model's own, which has some with a window: make it "
                "with DynamicCache(config=model.config)"
            )
        if any(getattr(layer, "record_past", False) for layer in cache.layers):
            raise NotServed("a cache that records what leaves its window")
        own_values = [one for part in (cache, *cache.layers) for one in vars(part).items()]
        # Of a cache made without a config, what its layers will be.
        plain = ("layer_class_to_replicate", DynamicLayer)
        if any(callable(value) and (name, value) != plain for name, value in own_values):
            raise NotServed(
                "a DynamicCache with methods of the program's own (its update replaced?): give a new one"
            )
        cache.__class__ = cls
        cache._become(kinds, list(own.is_sliding), list(getattr(own, "is_linear", ())))
        return cache

    @classmethod
    def made(cls, config: Any) -> "RemoteCache":
        return cls.adopt(DynamicCache(config=config), config)

    def _become(self, kinds: tuple[type, ...], sliding: list[bool], linear: list[bool]) -> None:
        self.__dict__.clear()
        self.session = 0
        self._layers = kinds, sliding, linear  # as the model's own cache would have them
        self.windows = any(kind is not DynamicLayer for kind in kinds)  # forgets what has left it
        self.past: Past | None = None
        self.changes: list[Change] = []  # to be made with the next forward
        self._length = 0
        self._rows = 0

    def take(self, past: Past, rows: int) -> None:
        """A forward has been through it."""
        self.session, self.past, self.changes = past.session, past, []
        self._length, self._rows = past.length, rows

    # ---- what transformers asks

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._length

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self._length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    @property
    def batch_size(self) -> int:
        return self._rows or -1

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_initialized(self) -> bool:
        return self._length > 0

    @property
    def is_croppable(self) -> bool:
        return not self.windows

    @property
    def is_linear(self) -> list[bool]:
        return self._layers[2]

    @property
    def is_sliding(self) -> list[bool]:
        return self._layers[1]

    def __len__(self) -> int:
        return len(self._layers[0])

    def __repr__(self) -> str:
        return f"<cache on the server: {counted(self._length, 'position')} of {counted(self._rows, 'row')}>"

    # ---- what generation does to it

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        if self._length:
            self._select("beam_idx", to_numpy("beam_idx", beam_idx, torch.int64))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        given = as_tensor("indices", indices, whole=True)
        if not self._length:
            return
        if given.dtype == torch.bool:
            if given.shape != (self._rows,):
                raise RequestError(
                    f"indices of bool and shape {tuple(given.shape)}: one for each of {counted(self._rows, 'row')}"
                )
            given = given.nonzero().reshape(-1)
        rows = to_numpy("indices", given, torch.int64)
        self._select("indices", np.where(rows < 0, rows + self._rows, rows))

    def _select(self, name: str, rows: np.ndarray) -> None:
        """Raises RequestError for a row that is not there, which would be found out with the next forward
        only, and with each behind that."""
        strange = rows[(rows < 0) | (rows >= self._rows)]
        if rows.ndim != 1 or not rows.size or strange.size:
            what = f"shape {rows.shape}" if not strange.size else f"row {strange.flat[0]}"
            raise RequestError(
                f"{name} with {what}: a list of rows, 0 to {self._rows - 1}, at least one"
            )
        self._become_rows(name, len(rows))
        self.changes.append(np.ascontiguousarray(rows))

    def batch_repeat_interleave(self, repeats: int) -> None:
        times = whole("repeats", repeats, least=1)
        if self._length and times != 1:
            self._become_rows("repeats", self._rows * times)
            self.changes.append(Repeat(times))

    def _become_rows(self, name: str, count: int) -> None:
        """Raises RequestError where no forward's ids have so many rows, as `_select` does and for its reason."""
        if count > IDS_LIMIT:
            raise RequestError(
                f"{name} with {counted(count, 'row')} to come of it: at most {IDS_LIMIT}"
            )
        self._rows = count

    def crop(self, tokens_to_remove: int) -> None:
        count = -whole("tokens_to_remove", tokens_to_remove)
        if count < 0:
            raise NotServed(
                f"crop({tokens_to_remove}): a negative number, of the positions to leave out at the end"
            )
        if count and self.windows:
            raise NotServed("crop of a cache with a window: what has left it is gone")
        count = min(count, self._length)
        if count:
            self.changes.append(Crop(count))
            self._length -= count

    def activate_past_recording(self) -> None:
        if self.windows:
            raise NotServed(
                "taking tokens back from a cache with a window: what has left it is gone"
            )

    def reset(self) -> None:
        self._become(*self._layers)

    def __deepcopy__(self, memo: Any = None) -> Self:
        """Another name for the same past: what is done to one does not show in the other."""
        copy = type(self).__new__(type(self))
        copy.__dict__.update(self.__dict__, changes=list(self.changes))
        return copy

    __copy__ = __deepcopy__

    # ---- what it does not have

    def __setattr__(self, name: str, value: Any) -> None:
        if hasattr(type(self), name):  # a method, of the program's own now: nothing here calls it
            raise NotServed(f"assigning cache.{name}: the keys and values are on the server")
        super().__setattr__(name, value)

    @property
    def layers(self) -> Any:
        raise Elsewhere("cache.layers: the keys and values are on the server")

    def __iter__(self) -> Any:
        raise NotServed("iterating over a cache: the keys and values are on the server")

    def update(self, *_: Any, **__: Any) -> Any:
        raise NotServed("cache.update: the keys and values are on the server")

    def get_mask_sizes(self, *_: Any, **__: Any) -> Any:
        raise NotServed("cache.get_mask_sizes: masks are made on the server")

    def __reduce__(self) -> Any:
        raise NotServed("a cache that is on the server cannot be pickled")


class Elsewhere(NotServed, AttributeError):
    """An attribute that a model or a cache in this process would have."""
