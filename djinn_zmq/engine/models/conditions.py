"""Conditions of stops, made ready once and asked at every place: typed data in, a test out."""

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from djinn_zmq.engine.models.loading import ServedModel
from djinn_zmq.engine.models.measuring import norms
from djinn_zmq.errors import StopError
from djinn_zmq.wire import stops as wire
from djinn_zmq.wire.stops import TESTS_LIMIT, Condition, HasNaN, Norm, Token

COMPARISONS = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}


@dataclass(frozen=True, slots=True, eq=False)
class Moment:
    """Which forward pass it is.

    ids: int64 (batch, positions), the tokens it works on. step: its number in a generation.
    """

    ids: np.ndarray
    step: int = 0


Test = Callable[[torch.Tensor, Moment], bool]  # asks the device: on a GPU it waits for it


class _Ready(NamedTuple):
    test: Test
    never: str  # why it can never hold; "": it may


def ready(
    condition: Condition,
    model: ServedModel,
    ids: np.ndarray,
    *,
    generates: bool = False,
    last_step: int | None = None,
) -> Test:
    """The test of *condition* for runs that begin with *ids*.

    generates: tokens and steps are still to come, up to *last_step* where that is known. Raises
    StopError for a condition that can never hold, with the reason.
    """
    count = sum(map(len, condition))
    if count > TESTS_LIMIT:
        raise StopError(f"a condition of {count} tests: at most {TESTS_LIMIT}")
    if not all(condition):
        raise StopError("a condition of no tests")
    last = last_step if generates else 0
    ways = [[_make(test, model, ids, generates, last) for test in way] for way in condition]
    never = [next((one.never for one in way if one.never), "") for way in ways]
    if all(never):
        raise StopError(f"a condition that can never hold: {'; '.join(dict.fromkeys(never))}")
    tests = [[one.test for one in way] for way in ways]
    return lambda value, moment: any(all(test(value, moment) for test in way) for way in tests)


def _make(
    test: wire.Test, model: ServedModel, ids: np.ndarray, generates: bool, last_step: int | None
) -> _Ready:
    if isinstance(test, HasNaN):
        return _Ready(lambda value, moment: bool(value.isnan().any()), "")
    if isinstance(test, Norm):
        return _norm(test)
    if isinstance(test, Token):
        return _token(test, model, ids, generates)
    return _step(test.number, generates, last_step)


def _norm(condition: Norm) -> _Ready:
    op, limit = condition.op, condition.value
    compare = COMPARISONS.get(op)
    if compare is None:
        raise StopError(f'Norm("{op}", {limit}): the comparison is one of {", ".join(COMPARISONS)}')
    never = ""
    if math.isnan(limit) or (op == ">" and limit == math.inf):
        never = f"no norm is {op} {limit}"
    elif (op == "<" and limit <= 0) or (op == "<=" and limit < 0):
        never = f"no norm is {op} {limit}: norms are not negative"
    return _Ready(lambda value, moment: bool(compare(norms(value), limit).any()), never)


def _token(condition: Token, model: ServedModel, ids: np.ndarray, generates: bool) -> _Ready:
    wanted = list(_ids_of(condition.token, model))
    never = ""
    if not generates and not np.isin(ids, wanted).any():
        never = f"the prompt holds no token {condition.token!r}"
    return _Ready(lambda value, moment: bool(np.isin(moment.ids, wanted).any()), never)


def _ids_of(token: int | str, model: ServedModel) -> set[int]:
    """The ids that *token* names: the text as a token of its own, with a blank before it or without.

    Raises StopError where the vocabulary has none.
    """
    if isinstance(token, int):
        if not 0 <= token < model.info.vocab_size:
            raise StopError(
                f'Token({token}): "{model.info.name}" has ids 0 to {model.info.vocab_size - 1}'
            )
        return {token}
    found = set()
    for text in (token, f" {token}"):
        coded = model.encode((text,))[0] if token.strip() else np.empty(0, np.int64)
        special = set(getattr(model.tokenizer, "all_special_ids", ()))
        plain = [int(one) for one in coded if int(one) not in special]
        # What the vocabulary does not have comes back as something else.
        if len(plain) == 1 and model.pieces(np.array(plain))[0].strip() == token.strip():
            found.add(plain[0])
    if not found:
        raise StopError(f'Token({token!r}): no single token of "{model.info.name}"')
    return found


def _step(number: int, generates: bool, last: int | None) -> _Ready:
    never = ""
    if number < 0 or (last is not None and number > last):
        there_are = "" if last is None else f": this generation has steps 0 to {last}"
        never = f"there is no step {number}{there_are if generates else ': a plain run is step 0'}"
    return _Ready(lambda value, moment: moment.step == number, never)
