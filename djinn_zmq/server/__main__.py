"""`python -m djinn_zmq.server`, the same as `djinn serve`."""

from djinn_zmq.server.command import serve

if __name__ == "__main__":
    serve(prog_name="python -m djinn_zmq.server")
