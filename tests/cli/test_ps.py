"""What `djinn ps` says of a server's memory."""

from djinn_zmq.cli.ps import report
from djinn_zmq.settings import GIB, MIB
from djinn_zmq.wire.messages import EngineInfo, MemoryInfo, SessionInfo, StatusReply
from djinn_zmq.wire.tiers import TierInfo


def test_each_engines_tiers_stand_together_with_what_they_are_full_to_and_its_keys_and_values() -> (
    None
):
    engines = tuple(EngineInfo(one, f"cuda:{one}", "ready", 7, 0, "", 0) for one in (0, 1))
    tiers = tuple(
        TierInfo(engine, name, limit, limit // 4, 3 + engine)
        for name, limit in (("device", 20 * GIB), ("host", 4 * GIB), ("disk", 0))
        for engine in (0, 1)
    )
    sessions = tuple(
        SessionInfo(number, "uid:1", "tiny", "open", 1, 2, MIB, 0, 1.0, True, kv=256 * MIB)
        for number in (1, 2)
    )
    memory = MemoryInfo(4 * GIB, 128 * MIB, GIB, 7, tiers)
    status = StatusReply("0", 1, 1.0, (), (), (), engines, sessions, memory)
    *_, table, total = report(status, 0.0).split("\n\n")
    assert [line.split() for line in table.splitlines()[1:]] == [
        line.split()
        for line in (
            "device  0  3  5.0 GiB  20.0 GiB  25%",
            "host    0  3  1.0 GiB  4.0 GiB  25%",
            "disk    0  3  0 B  none without --state",
            "device  1  4  5.0 GiB  20.0 GiB  25%",
            "host    1  4  1.0 GiB  4.0 GiB  25%",
            "disk    1  4  0 B  none without --state",
            "KV      1  -  512.0 MiB",
        )
    ]
    assert total.startswith(
        "memory: 7 checkpoints, each counted in every tier that has a copy; 128.0"
    )


def test_one_of_anything_is_not_several() -> None:
    memory = MemoryInfo(4 * GIB, 0, 0, 1, ())
    status = StatusReply("0", 1, 1.0, (), (), (), (), (), memory)
    assert report(status, 0.0).split("\n\n")[-1].startswith("memory: 1 checkpoint, each")
