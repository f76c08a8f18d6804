"""Sessions through random walks of what can be asked of them, against the same model without any cache: no token
of a conversation gets lost, counts twice, or comes under another forward's name."""

import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import djinn_zmq as djinn

TINY = "djinn_zmq/models/tiny"
LAYERS = 4
WALKS, STEPS = 12, 20
LONGEST = 120  # tokens; the model takes 256
TOLERANCE = 2e-4  # float32: with a cache, or without one, sums have other orders


@pytest.fixture(scope="module")
def model():
    with djinn.local("tiny", dtype="float32", threads=1) as model:
        yield model


@pytest.fixture(scope="module")
def plain():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    torch.set_num_threads(threads)


@dataclass
class Walk:
    """A session, and what is known of it: ids, all its tokens; inside, the layer of the forward that it stands
    in, whose step that is, and how many of *ids* have been run, or are about to be."""

    session: Any
    plain: Any
    dice: random.Random
    ids: list[int] = field(default_factory=list)
    inside: int | None = None
    step: int = 0
    ran: int = 0
    seen: list[tuple[Any, list[int], int]] = field(default_factory=list)  # with ids and step

    def prompt(self) -> list[int]:
        return [self.dice.randrange(208) for _ in range(self.dice.randint(1, 4))]

    def is_likeliest(self, token: int, ids: list[int]) -> bool:
        """Does it follow *ids*? Another machine may take another one of two that are as likely."""
        with torch.inference_mode():
            logits = self.plain(torch.tensor([ids])).logits[0, -1]
        return bool(logits[token] > logits.max() - TOLERANCE)

    def check(self, point: Any, ids: list[int], layer: int, step: int) -> None:
        """*point* is what the forward that ends with *ids* has come to after *layer*."""
        begin = len(ids) - point.shape[1]
        assert [*point.before.tolist(), *point.ids[0].tolist()] == ids
        assert (len(point.before), point.layer, point.position) == (begin, layer, len(ids))
        with torch.inference_mode():
            output = self.plain(torch.tensor([ids]), output_hidden_states=True)
        if layer < LAYERS:  # the last one of these has been through the norm
            expected = output.hidden_states[layer][:, begin:].numpy()
            assert np.abs(np.asarray(point.hidden) - expected).max() < TOLERANCE
        self.seen.append((point, ids, step))

    # ---- what is asked

    def run(self) -> None:
        stop, prompt = self.dice.choice([None, 0, 1, 2, 3, 4]), self.prompt()
        saves = [layer for layer in range(LAYERS + 1) if self.dice.random() < 0.2]
        saves = [layer for layer in saves if stop is None or layer <= stop]
        run = self.session.run(np.array(prompt), stop_at=stop, save_at=saves)
        self.ids = [*self.ids, *prompt]
        self.inside, self.step, self.ran = stop, 0, len(self.ids)
        kept = sorted({*saves, *(() if stop is None else (stop,))})
        assert list(run.checkpoints) == kept
        for layer in kept:
            self.check(run.checkpoints[layer], self.ids, layer, 0)

    def generate(self) -> None:
        prompt = self.prompt() if not self.ids or self.dice.random() < 0.5 else []
        ids, count = [*self.ids, *prompt], self.dice.randint(1, 5)
        # Tokens behind the forward at hand have one of their own, with which the steps begin anew.
        fresh = self.inside is None or len(ids) > self.ran
        first = 0 if fresh else self.step
        ready = fresh and len(ids) == self.ran  # the first token's logits are there
        steps = list(range(first + ready, first + count))
        steps = self.dice.sample(steps, self.dice.randint(1, len(steps))) if steps else None
        stop = self.dice.choice([None, 1, 2, 3])
        save = self.dice.choice([[], [2]]) if stop is None or stop >= 2 else []
        passed = None if fresh else self.inside
        generation = self.session.generate(
            np.array(prompt, int) if prompt else None, count, ends=(), stop_at=stop, save_at=save, steps=steps
        )  # fmt: skip
        self.follow(generation, ids, count, stop, save, steps, first, ready, passed)

    def follow(self, generation, ids, count, stop, save, steps, first, ready, passed) -> None:
        """Take what *generation* gives, all of it or a part. passed: up to which layer its first forward has
        been run before; ready: as a whole."""
        take = self.dice.choice([count, count, self.dice.randint(1, count)])
        for step in range(first, first + count):
            due = steps is None or step in steps
            behind = step == first and passed is not None
            runs = not (step == first and ready)
            stops = due and runs and stop is not None and not (behind and stop <= passed)
            saved = save if due and runs and not (behind and passed >= 2) else []
            if stops:
                assert next(iter(generation), None) is None
                assert (generation.reason, generation.step, generation.layer) == (
                    "stop",
                    step,
                    stop,
                )
                kept = {*saved, stop}
                assert set(generation.checkpoints) == kept
                for layer in sorted(kept):
                    self.check(generation.checkpoints[layer], ids, layer, step)
                self.ids, self.inside, self.step, self.ran = ids, stop, step, len(ids)
                left = count - (step - first)
                if self.dice.random() < 0.5 and left:
                    self.follow(
                        generation.resume(), ids, left, stop, save, steps, step, False, stop
                    )
                return
            token = next(iter(generation))
            assert token.step == step and self.is_likeliest(token.id, ids)
            assert list(token.checkpoints) == list(saved)
            for layer in saved:
                self.check(token.checkpoints[layer], ids, layer, step)
            ids = [*ids, token.id]
            if step - first + 1 == take < count:
                self.left(generation, ids)
                return
        assert next(iter(generation), None) is None and generation.reason == "length"
        # The last was drawn, and not run.
        self.ids, self.inside, self.ran = ids, None, len(ids) - 1

    def left(self, generation: Any, ids: list[int]) -> None:
        """Nothing of it is kept but its tokens: where the session stood, it stands."""
        generation.close()
        self.ids = ids

    def back(self) -> None:
        kept = [one for one in self.seen if one[0].kept]
        if kept:
            point, ids, step = self.dice.choice(kept)
            assert self.session.back(point) is point
            self.ids, self.inside, self.step, self.ran = ids, point.layer, step, len(ids)


@pytest.mark.parametrize("seed", range(WALKS))
def test_a_session_is_where_its_tokens_say_whatever_was_asked_of_it(model, plain, seed):
    with model.session() as session:
        walk = Walk(session, plain, random.Random(seed))
        for _ in range(STEPS):
            walk.dice.choice([walk.run, walk.generate, walk.generate, walk.back])()
            assert session.ids.tolist() == walk.ids
            if len(walk.ids) > LONGEST:
                break
