"""Taking a decoder apart at its layers, exactly, without knowing its code.

    record   call the model; every layer's `forward` is a stub that notes its arguments and hands
             its input on. That is each layer's exact rotary tables, masks, positions, for free.
    step     call one layer's own `forward` with what was noted for it.
    tail     call the model again; the last stub returns the final hidden state, so norm, head,
             scaling and soft-capping are the model's own.

Hidden states are positional argument 0 of every layer; the rest is carried opaquely. The stubs stay
in place (replacing `forward` on the instance is the one hook that can skip a layer), and outside a
record or a tail they pass straight through.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from djinn_zmq.engine.models import tails
from djinn_zmq.engine.models.caches import Caches
from djinn_zmq.engine.models.tails import Tail
from djinn_zmq.errors import ModelRefused

CHECK_SHAPES = ((1, 7), (2, 5))  # (batch, positions) of the self-check's prompts
CHECK_SEED = 20
NOTHING: Mapping[str, Any] = MappingProxyType({})


class _Noted(Exception):
    """Ends a record's forward at the last layer: the head need not run."""


@dataclass(slots=True)
class Recording:
    """What the model hands to its layers for one prompt."""

    ids: torch.Tensor  # int64 (batch, positions), on the device
    embedded: torch.Tensor  # (batch, positions, hidden_size): the input of layer 0
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]]  # of each layer, without hidden
    over_past: bool = False  # does it go on from keys and values?

    @property
    def nbytes(self) -> int:
        """Of all tensors in it, those that layers share counted once."""
        tensors = {id(self.embedded): self.embedded.nbytes}
        for args, kwargs in self.arguments:
            for value in (*args, *kwargs.values()):
                for item in value if isinstance(value, tuple) else (value,):
                    if isinstance(item, torch.Tensor):
                        tensors[id(item)] = item.nbytes
        return sum(tensors.values())

    def same_arguments(self, other: "Recording") -> bool:
        """Are layers given the same, bit for bit, beside the hidden state?"""
        return _same(self.arguments, other.arguments)


class Stepper:
    def __init__(
        self,
        model: nn.Module,
        reproducibly: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        """Put stubs into *model*'s layers. Raises ModelRefused where they cannot be found.

        reproducibly: what layers that go on from a past are run under (see `device.cuda.Reproducibly`).
        """
        self.model = model
        self._reproducibly = reproducibly
        self.layers = find_layers(model)
        self.num_layers = len(self.layers)
        self._own = [layer.forward for layer in self.layers]
        self._tuples = [0] * self.num_layers  # length of the tuple a layer returns; 0: a tensor
        self._at_layer: Callable[..., Any] = self._pass_through
        self._short_tail: Tail | None = None  # found by `check`
        self._short_last = False  # is it the way to the last position's logits, too?
        # Layers that change their input, or hand it on (num_layers: the tail). Found by `check`.
        self._touching: set[int] = set()
        self.caches = Caches(model)
        self.kind = ""  # the class of the model's outputs; found by `check`
        self.keeps_last = "logits_to_keep" in inspect.signature(model.forward).parameters
        for index, layer in enumerate(self.layers):
            layer.forward = self._stub(index)

    def _stub(self, index: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._at_layer(index, *args, **kwargs)

        return forward

    def _pass_through(self, index: int, *args: Any, **kwargs: Any) -> Any:
        out = self._own[index](*args, **kwargs)
        self._tuples[index] = len(out) if isinstance(out, tuple) else 0
        return out

    def _as_layer_output(self, index: int, hidden: torch.Tensor) -> Any:
        length = self._tuples[index]
        return (hidden,) + (None,) * (length - 1) if length else hidden

    def plain(self, ids: torch.Tensor, cache: Any = None, *, last: bool = False) -> torch.Tensor:
        """The uninterrupted model: ids int64 (batch, positions) → logits (batch, positions, vocab).

        Passes through every layer's own forward. This is what all else is compared with.
        cache: that goes on from a past. last: the logits of the last position alone, (batch, 1,
        vocab), as transformers' `generate` has the head compute them.
        """
        return self._logits(ids, cache, last=last)

    def _logits(
        self,
        ids: torch.Tensor,
        cache: Any = None,
        *,
        last: bool = False,
        arguments: Mapping[str, Any] = NOTHING,
    ) -> torch.Tensor:
        options = {**arguments} if cache is None else {**arguments, self.caches.name: cache}
        if last and self.keeps_last:
            options["logits_to_keep"] = 1
        with self._over(cache is not None and self.caches.over_past(cache)):
            output = self.model(input_ids=ids, use_cache=cache is not None, **options)
        self.kind = type(output).__name__
        logits: torch.Tensor = output.logits
        return logits[:, -1:] if last else logits

    def _over(self, past: bool) -> AbstractContextManager[object]:
        return self._reproducibly() if past else nullcontext()

    def record(
        self, ids: torch.Tensor, cache: Any = None, arguments: Mapping[str, Any] = NOTHING
    ) -> Recording:
        """What the model hands to its layers. Runs none of them.

        ids: int64 (batch, positions), on the model's device. cache: one of `caches`, for a prompt
        that goes on from a past; the layers that are then stepped write into it.
        arguments: what else the model's forward is called with.
        """
        noted: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        embedded: list[torch.Tensor] = []

        def note(index: int, *args: Any, **kwargs: Any) -> Any:
            if index != len(noted):
                raise ModelRefused(f"its forward calls layer {index} in place {len(noted)}")
            if not args or not isinstance(args[0], torch.Tensor):
                raise ModelRefused("its layers are not given hidden states as first argument")
            hidden, args = args[0], args[1:]
            if index == 0:
                embedded.append(hidden)
            noted.append((args, kwargs))
            if index == self.num_layers - 1:
                raise _Noted
            return self._as_layer_output(index, hidden)

        over_past = cache is not None and self.caches.over_past(cache)
        self._at_layer = note
        try:
            self._logits(ids, cache, arguments=arguments)
        except _Noted:
            pass
        finally:
            self._at_layer = self._pass_through
        if len(noted) != self.num_layers or not embedded:
            raise ModelRefused(f"its forward calls {len(noted)} of its {self.num_layers} layers")
        return Recording(ids, embedded[0], noted, over_past)

    def step(
        self, index: int, hidden: torch.Tensor, recording: Recording, *, lent: bool = False
    ) -> torch.Tensor:
        """Run layer *index* (0-based): hidden (batch, positions, hidden_size) in and out.

        lent: *hidden* is not to be changed, by this layer or a later one; it is copied where that
        might happen.
        """
        if lent and index in self._touching:
            hidden = hidden.clone()
        args, kwargs = recording.arguments[index]
        with self._over(recording.over_past):
            out = self._own[index](hidden, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    def tail(
        self,
        ids: torch.Tensor,
        hidden: torch.Tensor,
        *,
        last: bool = False,
        lent: bool = False,
    ) -> torch.Tensor:
        """What the model does after its last layer: logits (batch, positions, vocab).

        All positions, as the plain model computes them: a head run on the last position alone is
        another matrix product and differs in the last bits. last: that very product, which is
        what `generate` takes. Goes the short way where `check` has found one. lent: as for
        `step`.
        """
        if lent and self.num_layers in self._touching:
            hidden = hidden.clone()
        if self._short_tail is not None and (self._short_last or not last):
            return self._short_tail(hidden, last)
        return self.own_tail(ids, hidden, last=last)

    def own_tail(
        self, ids: torch.Tensor, hidden: torch.Tensor, *, last: bool = False
    ) -> torch.Tensor:
        """The tail by calling the model; always exact, and its preamble is run again."""

        def hand_on(index: int, embedded: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            last = index == self.num_layers - 1
            return self._as_layer_output(index, hidden if last else embedded)

        self._at_layer = hand_on
        try:
            return self._logits(ids, last=last)
        finally:
            self._at_layer = self._pass_through

    def outputs(
        self, ids: torch.Tensor, layers: Sequence[torch.Tensor], arguments: Mapping[str, Any]
    ) -> Any:
        """All that the model's forward gives, as transformers' own output, by calling the model.

        layers: what each layer has given; or of the last one alone, where *arguments* ask for
        nothing that looks at the others.
        """

        def hand_on(index: int, embedded: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            behind = self.num_layers - 1 - index
            given = layers[-1 - behind] if behind < len(layers) else embedded
            return self._as_layer_output(index, given)

        self._at_layer = hand_on
        try:
            return self.model(input_ids=ids, use_cache=False, **arguments)
        finally:
            self._at_layer = self._pass_through

    def check(self, vocab_size: int, device: torch.device, max_positions: int = 0) -> str:
        """Compare stepping with the plain model, bit for bit; says what was compared.

        max_positions: the longest prompt the model takes; 0: any.
        Raises ModelRefused with the first difference. Also learns which layers return tuples, which
        change their input, and whether there is a short way for the tail.
        """
        generator = torch.Generator().manual_seed(CHECK_SEED)
        shapes = [(batch, min(long, max_positions or long)) for batch, long in CHECK_SHAPES]
        for shape in shapes:
            ids = torch.randint(0, vocab_size, shape, generator=generator).to(device)
            plain = self.plain(ids)
            recording = self.record(ids)
            hidden = recording.embedded.clone()
            if hidden.ndim != 3:
                raise ModelRefused(
                    f"its layers take hidden states of shape {tuple(hidden.shape)}, not "
                    "(batch, positions, hidden_size)"
                )
            for index in range(self.num_layers):
                hidden = self._watched(
                    index, hidden, partial(self.step, index, recording=recording)
                )
            stepped = self._watched(self.num_layers, hidden.clone(), partial(self.own_tail, ids))
            if not same_bits(plain, stepped):
                raise ModelRefused(
                    "stepped through its layers it gives other logits than by itself: "
                    f"{difference(plain, stepped)} for a prompt of shape {shape}"
                )
        short = tails.find(self.model, self.layers, ids, same_bits)
        if short is not None and same_bits(
            self._watched(self.num_layers, hidden, partial(short, last=False)), plain
        ):
            self._short_tail = short
            self._short_last = same_bits(short(hidden, True), self.plain(ids, last=True))
        named = " and ".join(f"{batch}×{positions}" for batch, positions in shapes)
        way = "its own" if self._short_tail is None else "direct"
        return f"logits of {named} tokens equal bit for bit, stepped and plain; tail: {way}"

    def _watched(
        self, index: int, hidden: torch.Tensor, act: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """What *act* makes of *hidden*, noting under *index* whether that is a danger to *hidden*."""
        before = hidden.clone()
        out = act(hidden)
        handed_on = out.untyped_storage().data_ptr() == hidden.untyped_storage().data_ptr()
        if handed_on or not same_bits(before, hidden):
            self._touching.add(index)
        return out


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal as bytes: NaN equals itself, -0.0 does not equal 0.0."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(_bytes(one), _bytes(other))


def _same(one: Any, other: Any) -> bool:
    """What layers are given: tensors, containers, numbers; of anything else, caches say, the kind."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return same_bits(one, other)
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    return bool(one == other) if isinstance(one, (bool, int, float, str)) else True


def same_rows(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """bool (rows,): where two tensors (rows, width) of one dtype are equal as bytes."""
    equal: torch.Tensor = (one.view(torch.uint8) == other.view(torch.uint8)).all(-1)
    return equal


def _bytes(data: torch.Tensor) -> torch.Tensor:
    """uint8 (elements, itemsize)"""
    flat = data.contiguous().reshape(-1)  # a view of one dimension at least: a scalar has no bytes
    return flat.view(torch.uint8).reshape(-1, data.itemsize)


def difference(plain: torch.Tensor, stepped: torch.Tensor) -> str:
    if plain.shape != stepped.shape or plain.dtype != stepped.dtype:
        return f"{stepped.dtype} {tuple(stepped.shape)}, not {plain.dtype} {tuple(plain.shape)},"
    differing = int((_bytes(plain) != _bytes(stepped)).any(-1).sum())
    return f"{differing} of {plain.numel()} differ"


def find_layers(model: nn.Module) -> list[nn.Module]:
    """The decoder's layers, in order. Raises ModelRefused where there is not one clear list."""
    try:
        decoder = model.get_decoder()  # type: ignore[operator]
        count = model.config.get_text_config().num_hidden_layers  # type: ignore[union-attr, operator]
    except (AttributeError, NotImplementedError) as exc:
        raise ModelRefused(f"{type(model).__name__} is not a decoder: {exc}") from exc
    found = [
        child
        for child in decoder.children()
        if isinstance(child, nn.ModuleList) and len(child) == count
    ]
    if len(found) != 1:
        raise ModelRefused(
            f"{type(decoder).__name__} has {len(found)} lists of {count} layers: one is needed"
        )
    return list(found[0])
