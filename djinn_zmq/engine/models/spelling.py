"""The text of tokens as they come, one by one.

A token alone has no text: a character may take several, and some tokenizers write a space only
between two. So each time a few tokens before it are decoded with it, and what they give by
themselves is taken off.
"""

from collections.abc import Sequence
from typing import Any

CONTEXT = 6  # tokens
BROKEN = "\ufffd"  # what a part of a character decodes to


class Spelling:
    def __init__(self, tokenizer: Any, ids: Sequence[int], unspelled: int = 0) -> None:
        """tokenizer: None: there is no text. ids: the tokens so far. unspelled: how many of the last
        of them have not been given as text yet."""
        self._tokenizer = tokenizer
        self._ids = list(ids)
        self._spelled = len(self._ids) - unspelled

    @property
    def unspelled(self) -> int:
        return len(self._ids) - self._spelled

    def add(self, number: int) -> str:
        """What the next token adds to the text; "" within a character."""
        self._ids.append(number)
        if self._tokenizer is None:
            return ""
        start = max(0, self._spelled - CONTEXT)
        before = self._tokenizer.decode(self._ids[start : self._spelled])
        text = self._tokenizer.decode(self._ids[start:])
        if len(text) <= len(before) or text.endswith(BROKEN):
            return ""
        self._spelled = len(self._ids)
        return str(text[len(before) :])
