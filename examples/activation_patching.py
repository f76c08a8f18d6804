"""Which part of each layer carries the answer?  python examples/activation_patching.py [FOLDER]

"the capital of germany is" runs once, and all its modules' outputs stay on the server. "the capital of
france is" is stopped at each module in turn, and that module's output at one position is taken from germany's
run. Writes activation_patching.png: the probability of berlin, by layer.
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

import djinn_zmq as djinn

HERE, THERE = "the capital of france is", "the capital of germany is"
ANSWER = "berlin"
WIDTH = 0.27  # of a bar, in layers
PARTS = {"residual": "layers.{}", "attention": "layers.{}.self_attn", "MLP": "layers.{}.mlp"}


def effects(model: djinn.Model, position: int) -> dict[str, np.ndarray]:
    """By part, how likely the other answer becomes: float64 (layers,)."""
    answer = int(model.encode(ANSWER)[-1])
    found = {}
    for part, path in PARTS.items():
        paths = [path.format(layer) for layer in range(model.num_layers)]
        sources = model.run(THERE, save_at=paths, logits="none").checkpoints.values()
        points = model.run(HERE, save_at=paths, logits="none").checkpoints.values()
        shares = []
        for point, source in zip(points, sources, strict=True):
            logits = point.resume([djinn.Patch(source, at=(0, position))]).logits[0].astype(float)
            shares.append(np.exp(logits[answer] - np.logaddexp.reduce(logits)))
        found[part] = np.array(shares)
    return found


def main(folder: str = ".") -> None:
    with djinn.connect() as server:
        model = server.model("tiny")
        words = model.tokens(HERE)
        places = {f'at "{words[-2]}"': -2, f'at "{words[-1]}"': -1}
        figure, panels = plt.subplots(1, len(places), figsize=(9, 3.4), sharey=True)
        for panel, (name, position) in zip(panels, places.items(), strict=True):
            print(f"P({ANSWER}) with one output {name} from the other prompt's run")
            for shift, (part, shares) in enumerate(effects(model, position).items()):
                print(f"  {part:<10}", "  ".join(f"{share:.3f}" for share in shares))
                layers = np.arange(1, len(shares) + 1) + WIDTH * (shift - 1)
                panel.bar(layers, shares, WIDTH, label=part)
            panel.set(title=name, xlabel="layer", xticks=range(1, model.num_layers + 1))
            panel.grid(axis="y", alpha=0.3)
        panels[0].set_ylabel(f"P({ANSWER})")
        panels[0].legend()
        figure.suptitle(f'"{HERE}", patched from "{THERE}"')
        figure.tight_layout()
        path = Path(folder) / "activation_patching.png"
        figure.savefig(path, dpi=120)
        print(path)


if __name__ == "__main__":
    main(*sys.argv[1:])
