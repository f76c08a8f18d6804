"""`python -m djinn_zmq.engine`: started by a server, never by hand.

Ends with the server: by the end of file on the lease socket, and by the kernel (PDEATHSIG) where
the server was killed while this process was deep in a layer.
"""

import contextlib
import ctypes
import gc
import json
import logging
import os
import signal
import sys

import click

from djinn_zmq.settings import Settings

PR_SET_PDEATHSIG = 1
BROKEN_STATUS = 70  # EX_SOFTWARE: the device is of no use in this process any more


def _end_with(parent: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        sys.exit(1)


@click.command()
@click.option("--link", required=True)
@click.option("--lease-fd", type=int, required=True)
@click.option("--server-pid", type=int, required=True)
@click.option("--device", required=True)
@click.option("--index", type=int, required=True)
@click.option("--settings", required=True)
def main(link: str, lease_fd: int, server_pid: int, device: str, index: int, settings: str) -> None:
    """One engine. Its options are the server's to give."""
    _end_with(server_pid)
    logging.basicConfig(
        level=logging.INFO, format=f"%(asctime)s engine-{index} %(message)s", stream=sys.stderr
    )
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # Else each layer's keys of a long prompt leave a gap behind them that fits nothing: 50 GB of a GPU
    # taken for 42 (64 stopped sessions of the Llama-2-13B shape).
    if "PYTORCH_ALLOC_CONF" not in os.environ:  # its newer name
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    # What is imported stays: looking through it for garbage, again and again, takes a fifth of a start.
    gc.disable()
    # Here, not above: torch takes seconds, and the server's death is watched for from the start.
    import torch
    import transformers.modeling_utils  # noqa: F401  every model needs it

    from djinn_zmq.bus.lane import Ends
    from djinn_zmq.engine.device.devices import Broken, Cpu, Device
    from djinn_zmq.engine.loop import EngineLoop, connect
    from djinn_zmq.errors import Lost

    gc.freeze()
    gc.enable()
    ends = Ends(*map(int, link.split(",")))
    limits = Settings(**json.loads(settings))
    if limits.threads is not None:
        torch.set_num_threads(limits.threads)
    on: Device = Cpu()
    if device != "cpu":
        from djinn_zmq.engine.device.cuda import Cuda  # a CPU engine never touches CUDA

        on = Cuda(device)
    with contextlib.suppress(Lost):  # the server is gone, and so is the reason to be here
        loop = EngineLoop(*connect(ends, lease_fd, limits), on, limits, index)
        try:
            loop.serve()
        except Broken as exc:
            loop.farewell(str(exc))
            os._exit(BROKEN_STATUS)
        finally:
            loop.close()
    # Tearing down torch takes a second that nobody needs, and a server waits for.
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
