"""Hold a running program's next call in mid-model.  python examples/attach_to_a_running_program.py

A second process asks the model a question again and again, and knows of nothing. This one finds its
session, stops what it runs after layer 2, puts germany in the place of france, and lets it go on.
"""

import subprocess
import sys

import djinn_zmq as djinn

PROGRAM = """
import sys, djinn_zmq as djinn
with djinn.connect(sys.argv[1]) as server:
    model = server.model("tiny")
    for line in sys.stdin:                        # a question a line
        print(model.run(line.strip()).top(1)[0].token, flush=True)
"""
FRANCE, GERMANY = "the capital of france is", "the capital of germany is"


def main() -> None:
    with djinn.connect() as server:
        model = server.model("tiny")
        program = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, server.connection.endpoint],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

        def answer() -> str:
            return program.stdout.readline().strip()

        def ask() -> None:
            program.stdin.write(f"{FRANCE}\n")
            program.stdin.flush()

        ask()
        print(f"the program asks about france:      {answer()}")

        session = next(one for one in server.sessions() if one.pid == program.pid)
        germany = model.run(GERMANY, stop_at=2).checkpoint
        with server.attach(session, stop_at=2) as attached:
            ask()
            stop = attached.wait()
            print(f"held: {stop}")
            print(stop.checkpoint.lens())
            print(f"what it would say:                  {stop.checkpoint.resume().top(1)[0].token}")
            stop.continue_(edits=[djinn.Patch(germany, at=(0, 3))])
            print(f"with germany in france's place:     {answer()}")
        ask()
        print(f"detached, it asks again:            {answer()}")
        program.stdin.close()
        program.wait()


if __name__ == "__main__":
    main()
