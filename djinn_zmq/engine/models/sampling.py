"""Drawing tokens, with transformers' own arithmetic: the same seed gives the tokens of `generate`."""

import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from djinn_zmq.errors import RequestError, RunError
from djinn_zmq.wire.talks import Sampling


class Sampler:
    """Draws one token after the other. Its generator belongs to one branch."""

    def __init__(
        self, asked: Sampling, state: torch.Tensor | None, device: torch.device, vocab_size: int
    ) -> None:
        """state: of the branch's generator so far, where there was one."""
        check(asked, vocab_size)
        self._warpers = LogitsProcessorList()
        self._generator: torch.Generator | None = None
        if asked.temperature == 0:
            self._state = state  # kept for a later draw
            return
        if asked.temperature != 1:
            self._warpers.append(TemperatureLogitsWarper(asked.temperature))
        if asked.top_k:
            self._warpers.append(TopKLogitsWarper(asked.top_k))
        if asked.top_p < 1:
            self._warpers.append(TopPLogitsWarper(asked.top_p))
        self._generator = torch.Generator(device)
        if asked.seed is not None:
            self._generator.manual_seed(asked.seed)
        elif state is not None:
            self._generator.set_state(state)
        else:
            self._generator.seed()

    def draw(self, logits: torch.Tensor) -> int:
        """logits: (1, vocab), of any dtype. Raises RunError where they hold NaN."""
        scores = logits.float()
        if self._generator is None:
            return int(scores.argmax(-1))
        scores = self._warpers(None, scores)
        probabilities = torch.nn.functional.softmax(scores, dim=-1)
        # multinomial asserts on the device that there is no NaN, which on a GPU ends the process.
        unfit, fit = probabilities.isnan().any(), probabilities.nan_to_num(1.0)
        drawn = torch.multinomial(fit, 1, generator=self._generator)[0, 0]
        token, wrong = torch.stack((drawn, unfit.long())).tolist()
        if wrong:
            raise RunError("the logits hold NaN or infinity: no token can be drawn from them")
        return int(token)

    def state(self) -> torch.Tensor | None:
        return self._state if self._generator is None else self._generator.get_state()


def check(asked: Sampling, vocab_size: int) -> None:
    """Raises RequestError for what cannot be drawn by."""
    if not 0 <= asked.temperature < float("inf"):
        raise RequestError(f"temperature {asked.temperature}: 0 (greedy) or a positive number")
    if not 0 <= asked.top_k <= vocab_size:
        raise RequestError(f"top_k {asked.top_k}: 1 to {vocab_size}, or 0 for all tokens")
    if not 0 < asked.top_p <= 1:
        raise RequestError(f"top_p {asked.top_p}: above 0, at most 1")
    if asked.seed is not None and not 0 <= asked.seed < 1 << 63:
        raise RequestError(f"seed {asked.seed}: 0 to {(1 << 63) - 1}")
