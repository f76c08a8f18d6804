"""What would the model say if it ended after each layer?  python examples/logit_lens.py [PROMPT]

One run that keeps every layer's hidden state on the server; the lens is computed there.
"""

import sys

import djinn_zmq as djinn

PROMPT = "the capital of france is"


def main(prompt: str = PROMPT) -> None:
    with djinn.connect() as server:
        model = server.model("tiny")
        run = model.run(prompt, save_at="all")
        lens = run.lens(k=3)
        print(lens)
        print("\nat the last position, the three likeliest:")
        for layer in lens.layers:
            likeliest = lens[layer, lens.positions[-1]]
            print(f"  after {layer}    ", "  ".join(f"{text:<10} {p:.3f}" for text, p in likeliest))
        likeliest = "  ".join(f"{top.token:<10} {top.probability:.3f}" for top in run.top(3))
        print(f"  the model   {likeliest}")


if __name__ == "__main__":
    main(*sys.argv[1:])
