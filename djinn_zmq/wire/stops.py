"""Stops as data: where a run stops, on what condition, and what it keeps on the way.

A place is a number (so many layers executed) or a path: `layers.12.mlp`, `layers.12.mlp.input`,
`layers.12.self_attn.heads`, `norm`; with a leading dot it stands for that module of every layer.
"""

import msgspec


class HasNaN(msgspec.Struct, frozen=True, array_like=True, tag=0, forbid_unknown_fields=True):
    """Some number at the stop is not one."""


class Norm(msgspec.Struct, frozen=True, array_like=True, tag=1, forbid_unknown_fields=True):
    """The L2 norm of some position compares so with *value*."""

    op: str  # ">", ">=", "<", "<="
    value: float


class Token(msgspec.Struct, frozen=True, array_like=True, tag=2, forbid_unknown_fields=True):
    """The tokens this forward pass works on hold this one."""

    token: int | str


class Step(msgspec.Struct, frozen=True, array_like=True, tag=3, forbid_unknown_fields=True):
    """This forward pass is number *number* of a generation; a plain run is 0."""

    number: int


Test = HasNaN | Norm | Token | Step
Condition = tuple[tuple[Test, ...], ...]  # all tests of any one of these hold; (): in any case

TESTS_LIMIT = 64  # of one condition
ALL = "all"  # of `Stops.saves`: after every layer that the run comes to


class Break(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    at: int | str  # "": after whichever layer the condition holds first
    when: Condition


class Stops(msgspec.Struct, frozen=True, array_like=True, tag=0, forbid_unknown_fields=True):
    """What `Wanted.stop_at` holds where it is more than one number."""

    breaks: tuple[Break, ...]
    saves: tuple[str, ...]  # paths, and ALL; numbers are in `Wanted.save_at`


class Wanted(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Where to stop, what to keep on the way, and which logits to send."""

    stop_at: int | None | Stops
    save_at: tuple[int, ...]
    logits: str  # "last", "all", "none", or "top"
    top: int  # how many, for "top"


NOTHING = Wanted(None, (), "none", 0)  # of a run, or of a job that is none
