"""Numbers about activations of any shape whose first axes are (batch, positions)."""

import torch


def norms(data: torch.Tensor) -> torch.Tensor:
    """float32 (batch, positions): L2 over all further axes.

    Where there are but two axes (batch · positions, width), over the last of them.
    """
    return torch.linalg.vector_norm(data.double(), dim=axes_behind(data)).float()


def axes_behind(data: torch.Tensor) -> tuple[int, ...]:
    """The axes behind (batch, positions)."""
    return tuple(range(min(2, data.ndim - 1), data.ndim))
