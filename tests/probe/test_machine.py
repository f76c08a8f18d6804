import subprocess
import sys

from djinn_zmq.probe.machine import this_machine


def test_the_machine_names_its_cpu_kernel_and_versions():
    machine = this_machine()
    assert machine.cpu and machine.kernel and machine.memory > 0
    assert machine.versions["python"] == ".".join(map(str, sys.version_info[:3]))
    assert machine.cpu in str(machine) and machine.versions["pyzmq"] in str(machine)


def test_versions_are_read_without_importing_torch():
    code = (
        "import sys; from djinn_zmq.probe.machine import this_machine; this_machine(); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
