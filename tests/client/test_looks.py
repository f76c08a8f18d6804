"""What looks come to, here: tables, and what they have and have not."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from djinn_zmq.client.looks import Diff, Lens
from djinn_zmq.errors import LayerError, SelectionError
from djinn_zmq.spans import Spans


@pytest.fixture
def lens() -> Lens:
    """Of layers 1 and 3, at positions 0 and 4, two tokens each."""
    ids = np.arange(8).reshape(2, 1, 2, 2)
    tokens = np.array([f"t{number}" for number in range(8)], object).reshape(ids.shape)
    tokens[0, 0, 0, 0], tokens[1, 0, 1, 0] = "", "a\nb" + "x" * 30
    prompt = np.array([["the", ""]], object)
    return Lens(np.array([1, 3]), [0, 4], ids, ids / 10, tokens, prompt)


def test_a_lens_gives_a_cell_by_layer_and_position(lens: Lens) -> None:
    assert lens[1, 4] == [("t2", 0.2), ("t3", 0.3)]
    assert lens[np.int64(3), np.int64(0)] == [("t4", 0.4), ("t5", 0.5)]


@pytest.mark.parametrize("layer", [2, True, 1.0, "1"])
def test_a_lens_names_the_layers_that_it_has(lens: Lens, layer: Any) -> None:
    with pytest.raises(LayerError, match=r"it has \[1, 3\]"):
        lens[layer, 0]


@pytest.mark.parametrize("position", [1, -1, False, 0.0])
def test_a_lens_names_the_positions_that_it_has(lens: Lens, position: Any) -> None:
    with pytest.raises(SelectionError, match=r"it has \[0, 4\]"):
        lens[1, position]


@pytest.mark.parametrize("place", [1, (1,), (1, 0, 0), [1, 0]])
def test_a_lens_is_asked_by_two(lens: Lens, place: Any) -> None:
    with pytest.raises(SelectionError, match="a layer and a position"):
        lens[place]


def test_a_lens_is_a_table_of_its_likeliest_tokens(lens: Lens) -> None:
    assert str(lens).splitlines() == [
        "layer  0: the   4",
        "    1  0 0.00   t2 0.20",
        "    3  t4 0.40  a\\nb" + "x" * 13 + "… 0.60",
    ]


def test_what_is_to_be_printed_is_shown_so_in_a_notebook_too(lens: Lens) -> None:
    said: list[str] = []
    spans = Spans((("wire", 10_000),))
    for one in (lens, spans):
        one._repr_pretty_(SimpleNamespace(text=said.append), False)
    assert said == [str(lens), str(spans)]


def test_a_difference_is_told_in_a_line() -> None:
    ones = np.ones((1, 2), np.float32)
    assert str(Diff(ones, ones, 0.0, (0, 0, 0), True)) == "equal bit for bit"
    told = str(Diff(ones * 2, ones, 0.5, (0, 1, 7), False))
    assert told == "norms 2 to 2, cosine 1 to 1, largest difference 0.5 at [0, 1, 7]"
