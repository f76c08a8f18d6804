"""The sweep's benchmark runs end to end, and its ways agree. How fast they are is not asserted."""

import json

from click.testing import CliRunner

from bench import sweep


def test_every_way_is_measured_compared_with_full_forwards_and_written_down(tmp_path, lend):
    lend(sweep)
    path = tmp_path / "sweep.json"
    options = ["--quick", "--rounds=2", "--no-pin", f"--json={path}"]
    ended = CliRunner().invoke(sweep.main, options)
    assert ended.exit_code == 0, ended.output
    found = json.loads(path.read_text())
    assert all(check["held"] for check in found["checks"]) and len(found["checks"]) >= 2
    rates = {row["case"]: row for row in found["tables"]["tiny: cells a second"]}
    assert {"one full forward a cell", "djinn, trace", "djinn, one resume a cell"} <= set(rates)
    assert all(row["cells_per_s"] > 0 and row["n"] > 0 for row in rates.values())
    whole, usual = found["tables"]["tiny: cost"]
    assert (whole["cells"], whole["unchanged"]) == (48, 0) and usual["unchanged"] > 0
    measured = "nnsight, one trace a cell" in rates
    assert measured or any("nnsight" in one["what"] for one in found["not_measured"])
