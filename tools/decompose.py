"""Where a resume's time goes: `python -m tools.decompose`. Installed, it is `djinn-decompose`."""

from djinn_zmq.cli.decompose import decompose

if __name__ == "__main__":
    decompose(prog_name="python -m tools.decompose")
