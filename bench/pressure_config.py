"""What the memory-pressure experiment is told. See bench/configs/memory-pressure*.yaml."""

from dataclasses import dataclass, field

from djinn_zmq.errors import RequestError


@dataclass(frozen=True, slots=True)
class Validation:
    """What has to hold for exit status 0; what is not named is not asked for.

    sessions: resumed. token_accuracy: of all next (or generated) tokens, against the plain model.
    bit_exact: logits equal as bits. others_right: the second client's answers in between.
    device_memory_limit: peak of the device tier over its budget. plateau: peak of GPU memory over
    what it was when half of the sessions had stopped. evictions: at least so many. everything_freed:
    nothing is kept once all is released.
    """

    sessions: int | None = None
    token_accuracy: float | None = None
    bit_exact: bool | None = None
    steering_contained: bool | None = None
    others_right: bool | None = None
    device_memory_limit: float | None = None
    plateau: float | None = None
    evictions: int | None = None
    everything_freed: bool | None = None


@dataclass(frozen=True, slots=True)
class MemoryPressure:
    """context: tokens of each session's prompt. stop_at: layers; None: half of them.

    kv: sessions with keys and values that go on generating new_tokens after the resume; without,
    each is one run that goes on to its logits. steer: the session whose resume adds a vector.
    others_every: after so many sessions a second client asks something in between.
    gpu_memory, host_memory, disk: budgets of the server's tiers in MiB; None: its own defaults.
    gpu_share: in place of gpu_memory, the part of what the stopped sessions' keys and values need.
    """

    model: str = "tiny"
    device: str = "cpu"
    dtype: str = "auto"
    threads: int = 1
    sessions: int = 50
    context: int = 32
    stop_at: int | None = None
    kv: bool = False
    new_tokens: int = 4
    steer: int = 7
    others_every: int = 10
    seed: int = 11
    gpu_memory: int | None = None
    gpu_share: float | None = None
    host_memory: int | None = None
    disk: int | None = None
    output_dir: str = "memory-pressure"
    validation: Validation = field(default_factory=Validation)

    def __post_init__(self) -> None:
        for name in ("sessions", "context", "new_tokens", "others_every", "threads"):
            if getattr(self, name) < 1:
                raise RequestError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.gpu_share is not None and not 0 < self.gpu_share <= 1:
            raise RequestError(f"gpu_share is {self.gpu_share}: more than 0, and at most 1")
        if not 0 <= self.steer < self.sessions:
            raise RequestError(f"steer is {self.steer}: the sessions are 0 to {self.sessions - 1}")
