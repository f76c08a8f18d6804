"""Steer what is generated with a direction in the residual stream.  python examples/steering.py

The direction is the difference of two prompts' hidden states after a layer, germany minus france. It is
added to a third prompt stopped at that layer, which then goes on generating: the past is shared, and each
strength costs the layers above the stop alone.
"""

import numpy as np

import djinn_zmq as djinn

LAYER = 1
TEXT = "the capital of {} is"
STEERED = "spain"
NEW_TOKENS = 6


def direction(model: djinn.Model, to: str, away: str, position: int) -> np.ndarray:
    """float32 (hidden_size,)"""
    there, here = (
        model.run(TEXT.format(word), stop_at=LAYER, logits="none").checkpoint.hidden[0, position]
        for word in (to, away)
    )
    return there.astype(np.float32) - here.astype(np.float32)


def main() -> None:
    with djinn.connect() as server:
        model = server.model("tiny")
        prompt = TEXT.format(STEERED)
        position = model.tokens(prompt).index(STEERED)
        vector = direction(model, "germany", "france", position)
        print(f"|germany - france| after layer {LAYER}: {np.linalg.norm(vector):.2f}")
        with model.session() as session:
            stopped = session.generate(prompt, NEW_TOKENS, stop_at=LAYER, steps=0)
            for _ in stopped:
                pass
            for strength in (0, 0.5, 1, 2, 4):
                edit = djinn.Add(strength * vector, at=(0, position))
                branch = stopped.checkpoint.generate(NEW_TOKENS, [edit], logits=3)
                tokens = list(branch)
                rivals = ", ".join(
                    f"{top.token.strip()} {top.probability:.2f}" for top in tokens[0].top
                )
                print(
                    f"  {strength:>4} × : {prompt}{''.join(one.text for one in tokens):<32} ({rivals})"
                )


if __name__ == "__main__":
    main()
