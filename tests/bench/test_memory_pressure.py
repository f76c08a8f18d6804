"""Fifty stopped sessions in small: the validation block decides."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from bench import config, memory_pressure, plots
from bench.pressure_config import MemoryPressure
from djinn_zmq.errors import RequestError
from djinn_zmq.probe import schema, serving

ROOT = Path(__file__).parents[2]
CONFIG = """
model: tiny
sessions: 6
context: 9
kv: true
new_tokens: 3
steer: 2
others_every: 3
validation: {sessions: 6, token_accuracy: 1.0, others_right: true, everything_freed: true%s}
"""


def test_all_sessions_resume_with_the_plain_models_tokens_and_a_figure_is_drawn(tmp_path, lend):
    lend(serving)
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG % "")
    options = [f"--config={path}", f"--output-dir={tmp_path}"]
    ended = CliRunner().invoke(memory_pressure.main, options)
    assert ended.exit_code == 0, ended.output
    found = schema.read(tmp_path / "memory_pressure.json")
    assert len(found.checks) == 4 and all(one.held for one in found.checks)
    assert sorted(row["session"] for row in found.tables["resumes"]) == list(range(6))
    written = plots.draw([tmp_path], tmp_path / "figures")
    assert (tmp_path / "figures" / "figure6-memory-virtualization-tiny-9.png") in written


def test_what_is_asked_for_and_cannot_be_measured_is_a_failure_by_name(tmp_path, lend):
    lend(serving)
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG.replace("kv: true", "kv: false") % ", plateau: 1.05, bit_exact: true")
    ended = CliRunner().invoke(
        memory_pressure.main, [f"--config={path}", f"--output-dir={tmp_path}", "--sessions=3"]
    )
    assert ended.exit_code == 1
    assert "MISSED: at least 6 sessions resumed: 3" in ended.stderr
    assert "not measured: GPU memory at most 1.05" in ended.stderr
    assert "held: logits equal the plain model's as bits: 3 of 3" in ended.stdout


@pytest.mark.parametrize("name", ["tiny", "llama-2-13b"])
def test_its_files_are_read(name):
    path = ROOT / "bench" / "configs" / f"memory-pressure-{name}.yaml"
    found = config.read(MemoryPressure, path, {})
    assert found.sessions == 50 and found.validation.token_accuracy == 1.0


def test_a_wrong_key_in_the_validation_block_is_named(tmp_path):
    (tmp_path / "config.yaml").write_text("validation: {tokens_right: 1.0}\n")
    with pytest.raises(RequestError, match=r'validation.there is no key "tokens_right"'):
        config.read(MemoryPressure, tmp_path / "config.yaml", {})
