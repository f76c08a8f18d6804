"""Conversations on the engine, driven as its loop would, and transformers' own beside them."""

import inspect
import tempfile
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import torch
import transformers
from transformers import StaticCache

from djinn_zmq.engine.device.devices import Cpu
from djinn_zmq.engine.jobs.branches import TalkJob
from djinn_zmq.engine.jobs.job import EngineSession, Part, Turns
from djinn_zmq.engine.jobs.runs import Runner
from djinn_zmq.engine.jobs.talks import Talker
from djinn_zmq.engine.models import loading
from djinn_zmq.engine.models.loading import ServedModel
from djinn_zmq.engine.state.keeping import Keeping
from djinn_zmq.settings import MIB, Settings
from djinn_zmq.spans import Stopwatch
from djinn_zmq.wire.messages import Kept, Load, Resume, Wanted
from djinn_zmq.wire.talks import Continue, Generate, Sampling
from djinn_zmq.wire.tensors import inline
from tests.engine.architectures import tiny_model

LIMITS = Settings(host_memory=8 * MIB, arena=1 * MIB)
NEW = 6
GREEDY = Sampling(0.0, 0, 1.0, None)
NO_WISH = Wanted(None, (), "last", 0)
STATIC = 40


@cache
def both(name: str, dtype: Any) -> tuple[ServedModel, Any]:
    """A served model, and the same untouched."""
    with tempfile.TemporaryDirectory() as folder:
        tiny_model(name, dtype).save_pretrained(folder)
        served = loading.load(Load(name, folder, "auto"), Cpu(), lambda *_: None)
        own = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    return served, own


class Talk:
    """A session on the engine, driven as the loop would."""

    numbers = iter(range(1, 10**6))

    def __init__(self, keeping: Keeping, model: ServedModel, static: int = 0) -> None:
        self.model, self.static = model, static
        self.session = EngineSession(next(self.numbers), "me", model.info.name)
        self.runner = Runner(keeping)
        self.talker = Talker(keeping, self.runner)
        self.branch = 0
        self.kept: list[Kept] = []

    def drive(self, job: TalkJob, turns: Turns) -> Iterator[Part]:
        for part in turns:
            if part is not None:
                self.kept += part.meta.checkpoints
                job.kept = []
                yield part
        self.kept += job.kept
        if job.branch:
            self.branch = job.branch

    def done(self, pair: tuple[TalkJob, Turns]) -> TalkJob:
        for _ in self.drive(*pair):
            pass
        return pair[0]

    def run(self, ids: Any, wanted: Wanted = NO_WISH) -> TalkJob:
        asked = Continue(self.branch, self.static, "", inline(np.asarray(ids)), wanted)
        return self.done(
            self.talker.run(asked, (), self.session, self.model, Stopwatch(), shared=False)
        )

    def resume(self, checkpoint: int, wanted: Wanted = NO_WISH, edits: tuple = ()) -> TalkJob:
        asked = Resume(checkpoint, None, edits, wanted)
        pair = self.talker.resume(asked, (), self.session, self.model, Stopwatch(), shared=False)
        return self.done(pair)

    def begin(
        self, ids: Any = None, new: int = NEW, *, wanted: Wanted = NO_WISH, checkpoint: int = 0,
        edits: tuple = (), steps: tuple[int, ...] = (), sampling: Sampling = GREEDY,
        ends: tuple[int, ...] = (), branch: int | None = None,
    ) -> tuple[TalkJob, Turns]:  # fmt: skip
        asked = Generate(
            self.branch if branch is None else branch, self.static, checkpoint, None, edits, "",
            None if ids is None else inline(np.asarray(ids)), wanted, steps, new, sampling, ends,
        )  # fmt: skip
        return self.talker.generate(asked, (), self.session, self.model, Stopwatch(), shared=False)

    def generate(self, ids: Any = None, new: int = NEW, **more: Any) -> "Heard":
        job, turns = self.begin(ids, new, **more)
        return Heard(job, list(self.drive(job, turns)))


class Heard:
    """What a generation said."""

    def __init__(self, job: TalkJob, parts: list[Part]) -> None:
        self.job = job
        self.tokens = [part.meta.id for part in parts]
        self.logits = [bits(part) for part in parts]
        self.reason = job.reason


def bits(part: Part) -> bytes:
    where = part.meta.logits.where
    return bytes(where.data if hasattr(where, "data") else part.buffers[where.index])


def raw(logits: Any) -> bytes:
    return logits.contiguous().view(torch.uint8).numpy().tobytes()


def reference(own: Any, ids: Any, new: int = NEW, static: int = 0, **more: Any) -> Any:
    """The tokens and logits of the model by itself."""
    config = own.config.get_text_config(decoder=True)
    if static:
        more[own_cache_name(own)] = StaticCache(config=config, max_cache_len=static)
    out = own.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new,
        eos_token_id=None, pad_token_id=0, output_logits=True, return_dict_in_generate=True,
        **({"do_sample": False} | more),
    )  # fmt: skip
    return out.sequences[0, ids.shape[1] :].tolist(), [raw(one.to(own.dtype)) for one in out.logits]


def own_cache_name(own: Any) -> str:
    takes = inspect.signature(own.forward).parameters
    return next(name for name in ("cache", "past_key_values") if name in takes)
