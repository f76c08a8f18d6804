"""The check without which a model serves no sessions: are its cached steps exact?

A prefill and two steps of one token, three ways: the model by itself with transformers' cache; the
layers stepped, each time from a past that was put away as a value and taken out again; and, in the
second step, stopped half-way up and gone on with from there. On a GPU also: does a step behind a long
past give the same bits each time?
"""

import torch

from djinn_zmq.engine.models.caches import Account, Caches, Past, Working
from djinn_zmq.engine.models.stepping import CHECK_SEED, Stepper, difference, same_bits

PREFILL, STEPS = 7, 2
LONG, TIMES = 512, 8  # cuDNN's attention differs from 256 positions on


def check(stepper: Stepper, vocab_size: int, device: torch.device, max_positions: int = 0) -> str:
    """Why the model cannot go on from a past exactly; "" where it can."""
    caches = stepper.caches
    if not caches.name:
        return "its forward takes no cache"
    try:
        wrong = _check(stepper, caches, vocab_size, device, max_positions)
        if wrong or device.type == "cpu":
            return wrong
        return _check_long(stepper, caches, vocab_size, device, max_positions)
    except Exception as exc:  # noqa: BLE001  the model's own code may raise anything
        first = (str(exc).splitlines() or [""])[0]
        return f"its cached steps cannot be taken: {type(exc).__name__}: {first}"


def _check(
    stepper: Stepper, caches: Caches, vocab_size: int, device: torch.device, max_positions: int
) -> str:
    prefill = min(PREFILL, (max_positions or PREFILL + STEPS) - STEPS)
    if prefill < 1:
        return f"it takes {max_positions} positions, too few to check it"
    generator = torch.Generator().manual_seed(CHECK_SEED)
    tokens = torch.randint(0, vocab_size, (1, prefill + STEPS), generator=generator).to(device)
    own = caches.blank(0)
    if len(own.layers) != stepper.num_layers:
        return f"its cache has {len(own.layers)} layers, it has {stepper.num_layers}"
    account = Account()
    past = caches.nothing(account)
    ends = [prefill, *range(prefill + 1, prefill + STEPS + 1)]
    for begin, end in zip([0, *ends], ends, strict=False):
        ids = tokens[:, begin:end]
        plain = stepper.plain(ids, own, last=True)
        stop = stepper.num_layers // 2 if end == ends[-1] else 0
        stepped, past = _stepped(stepper, ids, past, account, stop)
        if not same_bits(plain, stepped):
            what = "a prefill" if begin == 0 else f"token {end}"
            return (
                f"its cached steps are not exact: {difference(plain, stepped)} for {what} "
                "stepped through its layers"
            )
    return ""


def _check_long(
    stepper: Stepper, caches: Caches, vocab_size: int, device: torch.device, max_positions: int
) -> str:
    past = min(LONG, (max_positions or LONG + 1) - 1)
    generator = torch.Generator().manual_seed(CHECK_SEED)
    tokens = torch.randint(0, vocab_size, (1, past + 1), generator=generator).to(device)
    account = Account()
    _, before = _stepped(stepper, tokens[:, :past], caches.nothing(account), account, 0)

    def step() -> torch.Tensor:
        return stepper.plain(tokens[:, past:], caches.open(before, 0, account).cache, last=True)

    first = step()
    differing = sum(not same_bits(first, step()) for _ in range(TIMES))
    if differing:
        return f"a step behind {past} tokens came out otherwise {differing} times of {TIMES}"
    return ""


def _stepped(
    stepper: Stepper, ids: torch.Tensor, past: Past, account: Account, stop: int
) -> tuple[torch.Tensor, Past]:
    """The logits of the last position, and the past with *ids*; by way of a stop where not 0."""
    working = _open(stepper, ids, past, account, ())
    recording = stepper.record(ids, working.cache)
    hidden = recording.embedded.clone()
    for index in range(stepper.num_layers):
        if stop and index == stop:
            working = _open(stepper, ids, past, account, working.below(stop))
            recording = stepper.record(ids, working.cache)
        hidden = stepper.step(index, hidden, recording)
    logits = stepper.tail(ids, hidden, last=True)
    working.finish()
    return logits, working.commit()


def _open(
    stepper: Stepper, ids: torch.Tensor, past: Past, account: Account, below: tuple
) -> Working:
    working = stepper.caches.open(past, 0, account, below)
    working.begin(ids.shape[1])
    return working
