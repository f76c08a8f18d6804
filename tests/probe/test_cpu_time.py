"""The CPU time of other processes is read by the clock of each."""

import os
import subprocess
import sys
import time

import pytest

from djinn_zmq.probe.cpu_time import cpu_ns


def test_the_time_of_several_processes_is_their_sum_and_one_that_is_gone_is_an_error():
    before_ns = time.process_time_ns()
    own_ns = cpu_ns([os.getpid()])
    assert before_ns <= own_ns <= time.process_time_ns()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        assert cpu_ns([os.getpid(), other.pid]) > own_ns
        other.stdin.close()
        other.wait()
        with pytest.raises(OSError):
            cpu_ns([other.pid])
