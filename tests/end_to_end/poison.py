"""Makes a real device fault, or what stands for one on a CPU, in an engine that a test starts.

`sitecustomize.py` in a folder of PYTHONPATH; when the file $DJINN_TEST_POISON appears, the next layer
that runs faults.
"""

import os
from pathlib import Path

PROGRAM = """
import os, sys, threading, time


def arm():
    # Until it is there as a whole: two threads that import the same modules get halves of them.
    name = "djinn_zmq.engine.loop"
    while name not in sys.modules or sys.modules[name].__spec__._initializing:
        time.sleep(0.02)
    import torch
    from djinn_zmq.engine.device import devices
    from djinn_zmq.engine.models import stepping

    own = stepping.Stepper.step

    def step(self, index, hidden, recording, **more):
        if os.path.exists(os.environ["DJINN_TEST_POISON"]):
            if hidden.is_cuda:  # a device-side assert, as a bad index in a kernel makes it
                torch.zeros(1, device="cuda")[torch.tensor([1 << 20], device="cuda")]
                torch.cuda.synchronize()
            raise RuntimeError("the device is poisoned")
        return own(self, index, hidden, recording, **more)

    stepping.Stepper.step = step
    devices.Cpu.broken = lambda self, error: str(error) if "poisoned" in str(error) else ""


if os.environ.get("DJINN_TEST_POISON"):
    threading.Thread(target=arm, daemon=True).start()
"""


def lay(folder: Path, monkeypatch) -> Path:
    """Arm the engines that are started from now on; returns the file that sets it off."""
    (folder / "sitecustomize.py").write_text(PROGRAM)
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
    trigger = folder / "now"
    monkeypatch.setenv("DJINN_TEST_POISON", str(trigger))
    return trigger
