"""What a caller may give as a prompt, and what it is on the wire."""

from typing import Any

import numpy as np

from djinn_zmq.client import checks
from djinn_zmq.errors import PromptError

Prompt = Any  # str, list of str, or token ids: (positions,) or (batch, positions)


def texts_of(prompt: Prompt) -> tuple[str, ...]:
    if isinstance(prompt, str):
        return (str(prompt),)
    if isinstance(prompt, (list, tuple)) and prompt and all(isinstance(p, str) for p in prompt):
        return tuple(map(str, prompt))
    return ()


def ids_of(prompt: Prompt) -> np.ndarray:
    """Token ids as int64 (batch, positions). Raises PromptError."""
    if checks.is_masked(prompt):
        raise PromptError(
            "a masked array of token ids, whose masked ones would be run: give others"
        )
    try:
        array = np.asarray(prompt)
    except ValueError as exc:
        raise PromptError(
            "the prompts have different lengths: prompts of one batch must have the same number "
            "of tokens; Model.batch runs them each by itself"
        ) from exc
    except (TypeError, RuntimeError) as exc:  # a torch tensor on a GPU
        raise PromptError(f"a prompt that numpy makes no array of: {exc}") from exc
    if array.size == 0:
        raise PromptError("an empty prompt cannot be run")
    if array.dtype.kind not in "iu" or array.ndim not in (1, 2):
        raise PromptError(
            f"a prompt of {array.dtype} and shape {array.shape}: give text, a list of texts, or "
            "int token ids of shape (positions,) or (batch, positions)"
        )
    return as_int64(array.reshape(-1, array.shape[-1]))


def as_int64(ids: np.ndarray) -> np.ndarray:
    """Whole numbers as they travel. Raises PromptError for one that would become another."""
    if ids.dtype == np.uint64 and ids.size and ids.max() > checks.LARGEST:
        raise PromptError(f"token id {ids.max()}: no model has one")
    return np.ascontiguousarray(ids, np.int64)
