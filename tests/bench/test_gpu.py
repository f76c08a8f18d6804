"""The experiment on one GPU is put together from its parts; each that is not there is named."""

from contextlib import contextmanager

from click.testing import CliRunner

from bench import config, gpu, parts
from bench.pressure_config import MemoryPressure
from djinn_zmq.errors import StartError
from djinn_zmq.probe import schema


def test_parts_without_their_server_and_parts_without_time_are_named_with_the_reason(
    tmp_path, monkeypatch
):
    @contextmanager
    def broken(_):
        raise StartError("the server ended with status 3")
        yield

    monkeypatch.setattr(gpu, "_server", broken)
    monkeypatch.setattr(parts, "LEAST_S", 1e9)
    ended = CliRunner().invoke(
        gpu.main, ["--shape=tiny", "--device=cpu", "--positions=32", f"--out={tmp_path}"]
    )
    assert ended.exit_code == 1 and "not all there: resume latency, 32 tokens" in ended.stderr
    missing = {one.what: one.why for one in schema.read(tmp_path / "summary.json").not_measured}
    assert missing["decomposition, ready"] == "the server ended with status 3"
    assert missing["tool noop, 50 ms idle"] == "no time was left for it"
    assert "figures and table" in missing and len(missing) == 11


def test_most_sessions_have_to_leave_the_memory_that_the_gpu_part_is_given():
    small = config.read(MemoryPressure, gpu.MEMORY, {})
    assert small.sessions * (1 - small.gpu_share) > small.validation.evictions >= small.sessions / 2
    assert small.validation.sessions == small.sessions
    whole = config.read(
        MemoryPressure, gpu.MEMORY.with_name("memory-pressure-llama-2-13b.yaml"), {}
    )
    assert whole.sessions == MemoryPressure().sessions == 50


def test_a_gpu_that_is_not_there_is_said_before_anything_is_measured(tmp_path):
    ended = CliRunner().invoke(gpu.main, ["--device=cuda:77", f"--out={tmp_path / 'none'}"])
    assert ended.exit_code == 1 and "no GPU here" in ended.stderr
    assert not (tmp_path / "none").exists()
