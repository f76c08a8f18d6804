"""Sessions that stop and are resumed, the same from the plain model, and the memory meanwhile."""

import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import djinn_zmq as djinn
from bench.plain import Plain, bits, config_of, device_of, kv_nbytes
from bench.pressure_config import MemoryPressure
from djinn_zmq.client.server import Server
from djinn_zmq.engine.models import shapes
from djinn_zmq.errors import DjinnError, LayerError
from djinn_zmq.probe import serving
from djinn_zmq.settings import MIB


@dataclass(slots=True)
class Stopped:
    """A session that waits. point: its checkpoint; going: its generation, where it has keys and
    values."""

    number: int
    ids: np.ndarray  # int64 (1, context)
    point: djinn.Checkpoint
    going: Any = None
    session: Any = None

    def let_go(self) -> None:
        """Of all that is kept for it."""
        self.going = None
        self.point.release()
        if self.session is not None:
            self.session.close()


@dataclass(frozen=True, slots=True)
class Came:
    """What a resume came to. logits: bits of the last position's, which give the first token."""

    number: int
    seconds: float
    tier: str
    tokens: tuple[int, ...]
    logits: bytes


class Pressure:
    def __init__(self, asked: MemoryPressure, stack: ExitStack) -> None:
        self.asked = asked
        self.timeline: list[dict[str, Any]] = []
        self.wrong_answers: list[str] = []
        self.others = 0
        self.away: Counter[int] = Counter()  # bytes of keys and values in host memory, by session
        self._seen = 0  # the number of the last event that was looked at
        self._stack = stack
        self._begin = time.monotonic()
        device_of(asked.device)
        self.config = config_of(asked.model)
        self.layer = self._layer()
        self.served = self._serve()
        # The server's own owner may hold all sessions: a connection for each would measure sockets.
        self.server: Server = self._connect()
        self.model = self.server.model(self.served.model)
        self.other = self._connect().model(self.served.model)
        self.rng = np.random.default_rng(asked.seed)
        self.prompts = self.rng.integers(
            0, self.model.vocab_size, (asked.sessions + 1, 1, asked.context)
        )
        self.plain = Plain(
            self.model.info.source, asked.dtype, asked.device, self.prompts[-1], asked.threads
        )
        self.vector = self._steering()

    def _layer(self) -> int:
        asked, count = self.asked, self.config.num_hidden_layers
        if asked.stop_at is not None and asked.stop_at > count:
            raise LayerError(
                f'layer {asked.stop_at} does not exist: "{asked.model}" has {count} layers (0-{count})'
            )
        return count // 2 if asked.stop_at is None else asked.stop_at

    def _gpu_memory(self) -> int | None:
        """MiB."""
        asked = self.asked
        if asked.gpu_share is None:
            return asked.gpu_memory
        need = asked.sessions * kv_nbytes(self.config, asked.context, self.layer)
        return max(1, int(asked.gpu_share * need) // MIB)

    def _serve(self) -> serving.Served:
        asked = self.asked
        more = [f"--threads={asked.threads}"]
        folder = self._stack.enter_context(serving.sockets_folder())
        budgets = {
            "gpu-memory": self._gpu_memory(), "host-memory": asked.host_memory, "disk": asked.disk,
        }  # fmt: skip
        more += [f"--{name}={value}" for name, value in budgets.items() if value is not None]
        if asked.disk is not None:
            state = self._stack.enter_context(serving.sockets_folder())
            more.append(f"--state={state}")
        shape = asked.model if asked.model in shapes.names() else None
        return self._stack.enter_context(
            serving.own_server(
                folder, *more, model=asked.model, shape=shape, device=asked.device,
                dtype=asked.dtype,
            )
        )  # fmt: skip

    def _connect(self) -> Server:
        return self._stack.enter_context(djinn.connect(self.served.ipc, progress=None))

    def _steering(self) -> np.ndarray:
        """float32 (hidden_size,), as long as the residual's own rows at the layer."""
        row = self.plain.hidden[self.layer][0, -1].float()
        noise = self.rng.standard_normal(self.model.hidden_size).astype(np.float32)
        return noise * np.float32(float(row.norm()) / np.linalg.norm(noise))

    # ---- stopping and resuming

    def stop(self, number: int) -> Stopped:
        ids = self.prompts[number]
        if not self.asked.kv:
            return Stopped(number, ids, self.model.run(ids, stop_at=self.layer).checkpoint)
        session = self.model.session()
        going = session.generate(
            ids[0], self.asked.new_tokens, stop_at=self.layer, steps=0, ends=(), logits="last"
        )
        for _ in going:
            pass
        return Stopped(number, ids, going.checkpoint, going, session)

    def resume(self, one: Stopped) -> Came:
        edits = self._edits(one.number)
        tier = self._tier(one)
        begin = time.perf_counter()
        if one.going is None:
            logits = one.point.resume(edits).logits
            elapsed_s = time.perf_counter() - begin
            token = int(np.argmax(logits[0].astype(np.float32)))
            return Came(one.number, elapsed_s, tier, (token,), logits.tobytes())
        going = one.going.resume(edits)
        first = next(iter(going))  # the latency is to the first token
        elapsed_s = time.perf_counter() - begin
        rest = [token.id for token in going]
        return Came(one.number, elapsed_s, tier, (first.id, *rest), first.logits.tobytes())

    def _tier(self, one: Stopped) -> str:
        """The slowest that any of it comes from."""
        self._look_at_events()
        away = one.session is not None and self.away[one.session.id] > 0
        tier: str = one.point.tier
        return "host" if away and tier == "device" else tier

    def _look_at_events(self) -> None:
        """Which keys and values have moved since the last look?"""
        for event in self.server.events(self._seen).so_far():
            self._seen = event.number
            if "keys and values" in event.text:
                self.away[event.session] += event.nbytes * (1 if event.kind == "evict" else -1)

    def _edits(self, number: int) -> list[Any]:
        return [djinn.Add(self.vector, at=(0, -1))] if number == self.asked.steer else []

    def ask_between(self) -> None:
        """The second client: is it served, and right, while others are stopped?"""
        self.others += 1
        try:
            self.other.ping()
            found = self.other.run(self.prompts[-1]).logits.tobytes()
        except DjinnError as exc:
            self.wrong_answers.append(str(exc))
            return
        if found != self.expected_other:
            self.wrong_answers.append("its logits differ from the plain model's")

    # ---- what the plain model says

    def expect(self) -> None:
        """What every session must come to, from the model in this process."""
        self.expected_other = self.plain.last_logits()
        self.expected = [self._plain(number) for number in range(self.asked.sessions)]
        self.unsteered = self._plain(self.asked.steer, steered=False)

    def _plain(self, number: int, *, steered: bool | None = None) -> tuple[tuple[int, ...], bytes]:
        """(tokens, bits of the logits) of one prompt."""
        steered = number == self.asked.steer if steered is None else steered
        ids = torch.from_numpy(self.prompts[number]).to(self.plain.device)
        with self._hooked() if steered else ExitStack():
            if self.asked.kv:
                out = self.plain.model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=self.asked.new_tokens,
                    do_sample=False,
                    eos_token_id=None,
                    pad_token_id=0,
                    return_dict_in_generate=True,
                    output_logits=True,
                )
                tokens = out.sequences[0, ids.shape[1] :].tolist()
                # `generate` hands out float32 copies, whatever the model computes in.
                return tuple(tokens), bits(out.logits[0].to(self.plain.model.dtype))
            logits = self.plain.model(ids, use_cache=False).logits[:, -1]
        return (int(logits[0].float().argmax()),), bits(logits)

    def _hooked(self) -> ExitStack:
        """The plain model with the vector added behind the layer, once: as one resume adds it. In
        float32 and rounded once, as Djinn's edits are."""
        vector = torch.from_numpy(self.vector).to(self.plain.device)
        done: list[bool] = []

        def add(hidden: torch.Tensor) -> None:
            if not done:
                hidden[0, -1] = (hidden[0, -1].float() + vector).to(hidden.dtype)
                done.append(True)

        if self.layer:
            layer = self.plain.layers[self.layer - 1]
            hook = layer.register_forward_hook(
                lambda _m, _a, out: add(out[0] if isinstance(out, tuple) else out)
            )
        else:
            layer = self.plain.layers[0]
            hook = layer.register_forward_pre_hook(lambda _m, args: add(args[0]))
        stack = ExitStack()
        stack.callback(hook.remove)
        return stack

    # ---- memory

    def sample(self, phase: str, sessions: int) -> None:
        """A row of the timeline. Bytes; None where it cannot be known here."""
        self._look_at_events()
        status = self.server.status()
        memory = status.memory
        row: dict[str, Any] = {
            "at_s": round(time.monotonic() - self._begin, 3),
            "phase": phase,
            "stopped": sessions,
            "checkpoints": memory.checkpoints,
            "host": memory.used,
            "host_limit": memory.limit,
            "engine_resident": sum(engine.resident for engine in status.engines),
            "kv": sum(getattr(session, "kv", 0) for session in status.sessions),
            "kv_host": sum(self.away[session.id] for session in status.sessions),
            "gpu": self._gpu_used(),
            "n": 1,
        }
        for tier in getattr(memory, "tiers", ()):
            row[tier.name] = tier.used
            row[f"{tier.name}_limit"] = tier.limit
            row[f"{tier.name}_checkpoints"] = tier.checkpoints
        self.timeline.append(row)

    def _gpu_used(self) -> int | None:
        """Of the whole device: weights, and what other programs have there, are in it."""
        if not self.plain.cuda:
            return None
        free, total = torch.cuda.mem_get_info(self.plain.device)
        return total - free
