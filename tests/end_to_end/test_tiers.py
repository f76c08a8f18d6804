"""Checkpoints in three tiers: they move as memory asks for it, and resume with the same bits."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import djinn_zmq as djinn
from djinn_zmq.cli.ps import report
from djinn_zmq.client.calls import Call
from djinn_zmq.client.sharing import Sharing
from djinn_zmq.errors import (
    AccessDenied,
    ArenaFull,
    BadFile,
    Lost,
    RequestError,
    UnknownCheckpoint,
)
from djinn_zmq.settings import MIB
from djinn_zmq.wire import messages
from djinn_zmq.wire.ops import Op
from djinn_zmq.wire.tiers import Hold
from tests.end_to_end import poison
from tests.end_to_end.conftest import free_port, running, until

FRANCE = "the capital of france is"
BIG = np.ones((8, 256), int)  # half a MiB of hidden state in float32
TINY = ("--model=tiny", "--dtype=float32")  # a CPU without bfloat16 takes five times as long for it
TIERS = ("--gpu-memory=3", "--host-memory=4", "--disk=16")


@pytest.fixture(scope="module")
def state(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("state") / "djinn"


@pytest.fixture(scope="module")
def served(tmp_path_factory, state):
    folder = tmp_path_factory.mktemp("served") / "s"
    with running(folder, *TINY, *TIERS, f"--state={state}", port=free_port()) as one:
        yield one


@pytest.fixture(scope="module")
def trigger(tmp_path_factory):
    """A file that is not there: when it is, the device of `small` is of no use any more."""
    with pytest.MonkeyPatch.context() as patch:
        yield poison.lay(tmp_path_factory.mktemp("poison"), patch)


@pytest.fixture(scope="module")
def small_state(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("small_state") / "djinn"


@pytest.fixture(scope="module")
def small(tmp_path_factory, trigger, small_state):
    """A server with room for little, the most of it on the device. The last test with it kills it."""
    folder = tmp_path_factory.mktemp("small") / "s"
    options = ("--gpu-memory=8", "--host-memory=2", "--disk=1", f"--state={small_state}")
    with running(folder, *TINY, *options, port=free_port()) as one:
        yield one


def numbered(n: int) -> np.ndarray:
    prompt = BIG.copy()
    prompt[:, 0] = n
    return prompt


def used(server, tier: str) -> int:
    return next(one.used for one in server.status().memory.tiers if one.name == tier)


# ---- moves


def test_a_checkpoint_is_kept_on_the_device_with_a_copy_in_host_memory(server, tiny):
    point = tiny.run(FRANCE, stop_at=2).checkpoint
    assert point.tier == "device"
    assert used(server, "device") == used(server, "host") == point.nbytes


def test_a_checkpoint_resumes_with_the_same_bits_from_every_tier(server, tiny):
    whole = tiny.run(FRANCE).logits.tobytes()
    point = tiny.run(FRANCE, stop_at=2).checkpoint
    rows = np.asarray(point.hidden).tobytes()
    for down in ("host", "disk"):
        assert point.evict(down) == down == point.tier
        assert np.asarray(point.hidden).tobytes() == rows
        assert point.tier == down  # looking at it does not bring it up
        done = point.resume()
        assert done.logits.tobytes() == whole
        assert point.tier == "device"  # using it does
    for up in ("host", "device"):
        point.evict("disk")
        assert point.prefetch(up) == up
        assert point.resume().logits.tobytes() == whole
    assert point.prefetch() == "device"
    assert done.spans["prefetch"] > 0


@pytest.mark.parametrize(
    "place", ["layers.1.self_attn.heads", "layers.1.mlp", "layers.1.mlp.input", "embedding", "norm"]
)
def test_a_checkpoint_at_a_module_comes_back_from_the_disk_and_is_no_file_to_load(
    tiny, state, place
):
    point = tiny.run(FRANCE, stop_at=place).checkpoint
    shape, bits = point.shape, np.asarray(point.hidden).tobytes()
    whole = point.resume().logits.tobytes()
    assert point.evict("disk") == "disk"
    assert point.hidden[...].shape == shape and np.asarray(point.hidden).tobytes() == bits
    assert point.resume().logits.tobytes() == whole
    point.evict("disk")
    with pytest.raises(BadFile, match=f"takes more than a file to go on from: {place}$"):
        tiny.load_checkpoint(state / f"{point.id:016x}.safetensors")
    assert point.resume().logits.tobytes() == whole


def test_edits_patches_and_looks_reach_a_checkpoint_in_a_file(tiny):
    mine = tiny.run(FRANCE, stop_at=2).checkpoint
    other = tiny.run("the capital of germany is", stop_at=2).checkpoint
    wanted = mine.resume([djinn.Patch(other, at=(0, 3))]).logits.tobytes()
    norms = mine.norms()
    mine.evict("disk"), other.evict("disk")
    assert (mine.norms() == norms).all()
    mine.evict("disk")
    assert mine.resume([djinn.Patch(other, at=(0, 3))]).logits.tobytes() == wanted


def test_a_resume_that_stops_where_it_began_copies_nothing(server, tiny):
    point = tiny.run(FRANCE, stop_at=2).checkpoint
    before = used(server, "device")
    same = point.resume(stop_at=2, logits="none")
    assert "copy" not in dict(same.spans)
    bits = np.asarray(point.hidden).tobytes()
    point.release()
    assert np.asarray(same.checkpoint.hidden).tobytes() == bits
    assert same.checkpoint.resume().top(1)[0].token == "paris"
    assert used(server, "device") == before


# ---- pressure


def test_more_than_the_device_and_the_host_hold_goes_to_the_disk_and_all_of_it_resumes(
    server, tiny, state
):
    wholes = [tiny.run(numbered(n)).logits.tobytes() for n in range(20)]
    points = [tiny.run(numbered(n), stop_at=2).checkpoint for n in range(20)]  # 10 MiB
    assert used(server, "device") <= 2 * MIB and used(server, "host") <= 4 * MIB
    assert used(server, "disk") >= 10 * MIB - 6 * MIB
    assert len(list(state.glob("*.safetensors"))) >= 8
    tiers = [point.tier for point in points]
    assert tiers[0] == "disk" and tiers[-1] == "device"  # the least recently used went first
    for point, whole in zip(points, wholes, strict=True):
        assert point.resume().logits.tobytes() == whole
    for point in points:
        point.release()
    assert used(server, "device") == used(server, "host") == used(server, "disk") == 0
    until(lambda: not list(state.iterdir()), "the files are removed")


def test_what_a_session_that_is_away_has_gives_way_first_and_comes_back_before_it(served, tiny):
    with served.connect() as other_server:
        other = other_server.model("tiny")
        theirs = other.run(numbered(1), stop_at=2).checkpoint
        mine = tiny.run(numbered(2), stop_at=2).checkpoint
        fresh = [other.run(numbered(n), stop_at=2).checkpoint for n in (3, 4)]  # the device is full
        assert (theirs.tier, mine.tier) == ("device", "device")
        tiny.away(3600)
        more = other.run(numbered(5), stop_at=2).checkpoint
        assert (theirs.tier, mine.tier, more.tier) == ("device", "host", "device")
        del fresh
        tiny.back_soon()
        until(lambda: mine.tier == "device", "it is brought back")


def test_a_full_machine_refuses_with_sizes_and_loses_nothing(small):
    with small.connect() as server:
        tiny = server.model("tiny")
        whole = tiny.run(numbered(1)).logits.tobytes()
        points = []
        with pytest.raises(
            ArenaFull, match=r"512.0 KiB of host memory asked, .*limit 2.0 MiB"
        ) as full:
            while len(points) < 30:
                points.append(tiny.run(numbered(1), stop_at=2).checkpoint)
        full_too = "--host-memory; full as well: the device tier (limit 8.0 MiB), the disk tier"
        assert full_too in str(full.value)
        assert len(points) >= 8 + 4 + 2
        for point in points:
            assert point.resume().logits.tobytes() == whole
        points.pop().release()
        points.pop().release()
        assert tiny.run(numbered(1), stop_at=2).checkpoint.resume().logits.tobytes() == whole


def test_moves_are_events_of_their_owner(server, tiny):
    last = max((event.number for event in server.events().so_far()), default=0)
    point = tiny.run(FRANCE, stop_at=2).checkpoint
    point.evict("disk")
    point.resume()
    kinds = [event.kind for event in server.events(last).so_far()]
    assert [kind for kind in kinds if kind in ("write", "evict", "prefetch")] == [
        "write",
        "evict",
        "evict",
        "prefetch",
        "prefetch",
    ]
    event = next(one for one in server.events(last).so_far() if one.kind == "evict")
    assert f"{point.id:x}" in event.text and event.nbytes == point.nbytes
    assert event.session == tiny.session_id


def test_a_stranger_learns_of_no_moves(served, tiny):
    tiny.run(FRANCE, stop_at=2).checkpoint.evict("disk")
    with djinn.connect(served.tcp) as stranger:
        assert all(event.kind == "engine" for event in stranger.events().so_far())


# ---- views


def test_a_writable_view_is_resumed_where_it_stands(server, tiny):
    point = tiny.run(numbered(1), stop_at=2).checkpoint
    array = point.writable()
    assert array.flags.writeable and array.tobytes() == np.asarray(point.hidden).tobytes()
    assert point.resume(hidden=array).logits.tobytes() == point.resume().logits.tobytes()
    before = server.status().memory.arenas
    array[:, -1] = 0
    wanted = point.resume([djinn.Zero(at=(slice(None), -1))]).logits.tobytes()
    assert point.resume(hidden=array).logits.tobytes() == wanted
    assert server.status().memory.arenas == before  # not staged a second time
    assert tiny.connection.sharing.slot_of(array) is not None
    assert tiny.connection.sharing.slot_of(array[:1]) is None


def test_a_writable_view_that_is_gone_gives_its_slot_back(tiny):
    point = tiny.run(numbered(1), stop_at=2).checkpoint
    places = set()
    for _ in range(5):
        array = point.writable()
        places.add(array.__array_interface__["data"][0])
        del array
    assert len(places) == 1


def test_a_view_of_the_slot_itself_keeps_it_in_place(tiny):
    point = tiny.run(numbered(1), stop_at=2).checkpoint
    bits = np.asarray(point.hidden).tobytes()
    view = point.hidden.view()
    assert view.tobytes() == bits
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 0
    with pytest.raises(RequestError, match="a view of the checkpoint is in use"):
        point.evict("disk")
    row = view[3, 5]
    del view
    crowd = [tiny.run(numbered(n), stop_at=2).checkpoint for n in range(12)]
    assert row.tobytes() == np.asarray(point.hidden[3, 5]).tobytes()
    point.release()
    crowd += [tiny.run(numbered(n), stop_at=2).checkpoint for n in range(12)]
    assert row.tobytes() == np.frombuffer(bits, row.dtype).reshape(8, 256, 64)[3, 5].tobytes()
    del row, crowd


def test_a_view_that_cannot_be_mapped_keeps_nothing_in_place(tiny, monkeypatch):
    point = tiny.run(FRANCE, stop_at=2).checkpoint

    def fails(*_):
        raise Lost("the arena is gone")

    with monkeypatch.context() as patch:
        patch.setattr(Sharing, "arena", fails)
        with pytest.raises(Lost, match="the arena is gone"):
            point.hidden.view()
    assert point.evict("disk") == "disk"


def test_a_view_that_comes_when_nobody_waits_for_it_any_more_keeps_nothing_in_place(server, tiny):
    point = tiny.run(FRANCE, stop_at=2).checkpoint
    asked = Call(Op.HOLD, Hold(point.id, "host", False), session=point._kept.session)
    connection = server.connection
    connection.give_up(connection.send(asked))
    tiny.ping()
    assert point.evict("disk") == "disk"


def test_the_same_calls_work_by_copying_over_tcp(served):
    with djinn.connect(served.tcp) as server:
        tiny = server.model("tiny")
        point = tiny.run(FRANCE, stop_at=2).checkpoint
        whole = point.resume().logits.tobytes()
        point.evict("disk")
        assert point.resume(hidden=point.writable()).logits.tobytes() == whole
        assert point.hidden.view().tobytes() == np.asarray(point.hidden).tobytes()


# ---- damaged files


def test_a_changed_bit_in_the_disk_tier_is_found_whoever_reads_it(served, tiny, state, tmp_path):
    point = tiny.run(numbered(1), stop_at=2).checkpoint
    path = state / f"{point.id:016x}.safetensors"
    bits, whole = np.asarray(point.hidden).tobytes(), point.resume().logits.tobytes()
    point.evict("disk")
    point.prefetch("host")  # it is in both
    raw = path.read_bytes()
    at = raw.rindex(bits[-8:]) + 7  # the last byte of hidden
    path.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
    assert point.resume().logits.tobytes() == whole  # the copy in memory is used
    assert np.asarray(point.hidden).tobytes() == bits
    point.evict("disk")
    first = np.frombuffer(bits, point.dtype).reshape(point.shape)[[0, 1], 5]
    assert np.array_equal(point.hidden[[0, 1], 5], first)  # what is not read is not looked at
    named = rf"{path.name} is damaged: bytes 262144 to 524288 of hidden have the checksum"
    for use in (
        point.resume,
        point.norms,
        point.prefetch,
        lambda: point.hidden[-1, -1],
        lambda: point.hidden[:, -1, ::2],
        lambda: point.hidden[[0, -1], -1],
        lambda: point.save(tmp_path / "elsewhere"),
        lambda: tiny.load_checkpoint(path),
    ):
        with pytest.raises(BadFile, match=named):
            use()
    assert not (tmp_path / "elsewhere").exists()
    assert np.asarray(point.hidden[0, 0]).tobytes() == bits[:256]  # what is good can be read
    assert point.hidden[0, 0, 0] == np.frombuffer(bits, point.hidden.dtype)[0]
    assert tiny.run(FRANCE).top(1)[0].token == "paris"
    path.write_bytes(raw)
    assert point.resume().logits.tobytes() == whole


def test_a_file_that_is_damaged_on_the_disk_is_named_when_it_is_needed(tiny, state):
    point = tiny.run(FRANCE, stop_at=2).checkpoint
    point.evict("disk")
    path = state / f"{point.id:016x}.safetensors"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(BadFile, match=path.name):
        point.resume()
    path.unlink()
    with pytest.raises(BadFile, match="No such file"):
        point.resume()
    assert tiny.run(FRANCE).top(1)[0].token == "paris"


# ---- what outlives what


def test_all_tiers_but_the_device_outlive_an_engine_that_ends_itself_with_the_reason(
    small, trigger
):
    with small.connect() as server:
        tiny = server.model("tiny")
        whole = tiny.run(numbered(1)).logits.tobytes()
        points = [tiny.run(numbered(1), stop_at=2).checkpoint for _ in range(10)]
        rows = np.asarray(points[0].hidden).tobytes()
        kept = [bool({"host", "disk"} & set(_copies(point))) for point in points]
        assert not all(kept) and any("disk" in _copies(point) for point in points)
        pid = small.engine_pid()
        trigger.touch()
        with pytest.raises(Lost, match=rf"pid {pid}\) ended itself: the device is poisoned.*kept"):
            tiny.run(FRANCE)
        trigger.unlink()
        for point, there in zip(points, kept, strict=True):
            if there:
                assert point.resume().logits.tobytes() == whole
                assert np.asarray(point.hidden).tobytes() == rows
            else:
                with pytest.raises(
                    UnknownCheckpoint, match="lost with an engine that had the only"
                ):
                    point.resume()
        assert small.engine_pid() != pid
        texts = [event.text for event in server.events().so_far() if event.kind == "engine"]
        assert any("ended itself: the device is poisoned" in text for text in texts)


def _copies(point) -> tuple[str, ...]:
    point.tier  # noqa: B018  asks anew
    return point._kept.tiers


def test_checkpoints_in_files_come_back_with_the_server_to_their_owner(
    small, serve, small_state, tmp_path
):
    state = small_state
    until(lambda: not list(state.iterdir()), "nothing is left of the tests before")
    with small.connect() as server, djinn.connect(small.tcp) as stranger:
        tiny = server.model("tiny")
        whole = tiny.run(numbered(1)).logits.tobytes()
        point = tiny.run(numbered(1), stop_at=2).checkpoint
        left = tiny.run(FRANCE, stop_at=3).checkpoint  # in memory, as there is room for it
        inside = tiny.run(FRANCE, stop_at="layers.1.mlp").checkpoint
        strange = stranger.model("tiny").run(FRANCE, stop_at=1).checkpoint
        for one in (point, inside, strange):
            one.evict("disk")
        number = point.id
        (state / ".half.tmp").write_bytes(b"of the one that runs")
        command = [sys.executable, "-m", "djinn_zmq.server", "--device=cpu", "--port=0"]
        command += [f"--ipc={tmp_path}/djinn.sock", f"--state={state}"]
        second = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
        assert second.returncode == 1 and "already keeps checkpoints in" in second.stderr
        assert (state / ".half.tmp").exists()
        small.process.kill()
        small.process.wait()
    for leftover in small.path.parent.iterdir():
        leftover.unlink()
    del left
    (state / "deadbeef.safetensors").write_bytes(b"no checkpoint")
    (state / ".half.tmp").write_bytes(b"half")
    with serve(*TINY, f"--state={state}", "--disk=1", port=free_port()) as running:
        assert not (state / ".half.tmp").exists()
        assert {path.name for path in state.iterdir()} == {
            "deadbeef.safetensors",
            f"{number:016x}.safetensors",
        }
        for gone, why in ((inside, "(layers.1.mlp) ended with its engine"), (strange, "a key")):
            said = f"checkpoint {gone.id:x} after layer {gone.layer} is removed: "
            assert said in running.words() and why in running.words()
        with djinn.connect(running.tcp) as stranger:
            theirs = stranger.model("tiny")
            assert theirs.returned() == []
            with pytest.raises(UnknownCheckpoint, match="not yours"):
                theirs.checkpoint(number)
        with running.connect() as server:
            tiny = server.model("tiny")
            (found,) = tiny.returned()
            shown = f"<returned {number:#x} after layer 2: float32 {found.shape}, disk>"
            assert (found.id, found.layer, repr(found)) == (number, 2, shown)
            memory = server.status().memory
            nbytes = (state / f"{number:016x}.safetensors").stat().st_size
            assert (memory.unclaimed, memory.unclaimed_nbytes) == (1, nbytes)
            assert re.search(r"unclaimed +- +1 +5\d\d\.\d KiB", report(server.status(), 0.0))
            more = tiny.run(numbered(2), stop_at=2).checkpoint
            with pytest.raises(
                ArenaFull, match=r"limit 1.0 MiB, 5\d\d.\d KiB of it with what model"
            ):
                more.evict("disk")
            tiny.ping()
            # The engine is at this for a while: it finds the server's word and the client's at once.
            long = messages.Tokens("the capital " * 9000, None)
            server.connection.send(Call(Op.TOKENS, long, session=tiny.session_id))
            again = tiny.checkpoint(found)
            resumed = again.resume().logits.tobytes()
            assert (again.id, again.layer, resumed) == (number, 2, whole)
            assert repr(again).endswith("disk>")  # as it was claimed
            assert np.asarray(again.hidden).shape == again.shape
            assert tiny.returned() == [] and server.status().memory.unclaimed == 0
            assert more.evict("disk") == "disk"
            with pytest.raises(UnknownCheckpoint):
                tiny.checkpoint(number)


def test_the_state_directory_must_be_the_users_alone(tmp_path):
    (tmp_path / "open").mkdir(0o755)
    command = [sys.executable, "-m", "djinn_zmq.server", "--device=cpu", "--port=0"]
    command += [f"--ipc={tmp_path}/djinn.sock", f"--state={tmp_path}/open"]
    ended = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1 and "run 'chmod 700" in ended.stderr


def test_a_client_maps_no_arena_in_which_nothing_is_its_own(served, tiny):
    with djinn.connect(served.tcp) as stranger:
        theirs = stranger.model("tiny").run(numbered(1), stop_at=2).checkpoint
        number = theirs._kept.tensor.where.arena
        with pytest.raises(AccessDenied, match="nothing of yours is in arena"):
            tiny.connection.sharing.arena(number)
