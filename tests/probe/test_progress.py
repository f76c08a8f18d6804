from djinn_zmq.probe import progress


def test_without_a_terminal_lines_come_now_and_then_with_the_time_left(capsys, monkeypatch):
    moments = iter([0.0, 1.0, 20.0, 21.0, 40.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(moments))
    with progress.steps("measuring", 10, done=2) as tell:
        for name in "abcd":
            tell(name)
    assert capsys.readouterr().err.splitlines() == [
        "measuring: 4 of 10, 60 s left",
        "measuring: 6 of 10, 40 s left",
    ]
