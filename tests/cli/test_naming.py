"""How `djinn ps` and `djinn debug` name a program."""

import pytest

from djinn_zmq.cli.naming import shown
from djinn_zmq.cli.ps import report
from djinn_zmq.settings import GIB
from djinn_zmq.wire.messages import MemoryInfo, SessionInfo, StatusReply


@pytest.mark.parametrize(
    ("command", "line"),
    [
        ("/opt/bin/python3 -u /home/ann/patch.py --out /tmp/x", "python3 -u patch.py --out /tmp/x"),
        ("/opt/bin/python -m pytest /tmp/tests", "python -m pytest /tmp/tests"),
        ("python -c import os\n\nprint(1/2)", "python -c import os print(1/2)"),
        ("python /home/ann/a.py " + 40 * "x", "python a.py " + 27 * "x" + "…"),
        ("", ""),
    ],
)
def test_a_program_is_named_by_its_own_file_and_arguments_in_one_short_line(
    command: str, line: str
) -> None:
    assert shown(command) == line
    session = SessionInfo(1, "uid:1", "tiny", "open", 1, 2, 3, 0, 1.0, True, 0, program=command)
    status = StatusReply("0", 1, 1.0, (), (), (), (), (session,), MemoryInfo(GIB, 0, 0, 1, ()))
    assert report(status, 0.0).split("\n\n")[4].endswith(f"  {line}".rstrip())
