"""The likeliest tokens, also where many are equally likely."""

import pytest

torch = pytest.importorskip("torch")

from djinn_zmq.engine.models.ranking import top_of


def reference(row: torch.Tensor, count: int) -> list[int]:
    """By value downwards, of equals the lower id first."""
    return sorted(range(len(row)), key=lambda one: (-float(row[one]), one))[:count]


@pytest.mark.parametrize("count", [1, 5, 40])
def test_of_equals_the_lower_id_comes_first(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    logits = torch.randint(-4, 5, (30, 40), generator=generator).to(torch.bfloat16)
    values, ids = top_of(logits, count)
    assert ids.tolist() == [reference(row, count) for row in logits]
    assert torch.equal(values, logits.gather(-1, ids))


def test_rows_without_ties_are_what_topk_says() -> None:
    logits = torch.randn(4, 100, generator=torch.Generator().manual_seed(0))
    values, ids = top_of(logits, 7)
    assert torch.equal(values, logits.topk(7).values) and torch.equal(ids, logits.topk(7).indices)
