"""Where is the answer, layer by position?  python examples/causal_trace.py [FOLDER]

Each cell is the corrupted prompt's run with the clean one's hidden state at one layer and position, all of
them rows of a few batches on the server. Writes causal_trace.png.
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

import djinn_zmq as djinn

CLEAN, CORRUPTED = "the capital of france is", "the capital of germany is"


def main(folder: str = ".") -> None:
    with djinn.connect() as server:
        model = server.model("tiny")
        grid = model.trace(CLEAN, CORRUPTED).finish()
        print(grid)
        shares = grid.recovered
        figure, panel = plt.subplots(figsize=(6.4, 4.2))
        image = panel.imshow(shares, cmap="viridis", vmin=0, vmax=1, aspect="auto", origin="lower")
        for (row, column), share in np.ndenumerate(shares):
            colour = "black" if share > 0.6 else "white"
            panel.text(
                column,
                row,
                f"{share:.2f}".replace("-0.00", "0.00"),
                ha="center",
                va="center",
                color=colour,
            )
        panel.set_xticks(range(shares.shape[1]), model.tokens(CORRUPTED))
        panel.set_yticks(range(len(grid.layers)), grid.layers)
        panel.set(xlabel="position patched", ylabel="after layer")
        panel.set_title(f"{grid.texts[0]} brought back over {grid.texts[1]}")
        figure.colorbar(image, label="recovered share of the logit difference")
        figure.tight_layout()
        path = Path(folder) / "causal_trace.png"
        figure.savefig(path, dpi=120)
        print(path)


if __name__ == "__main__":
    main(*sys.argv[1:])
