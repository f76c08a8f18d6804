"""How long does a resume take, and does it depend on the layer? `python -m bench.resume`."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

import djinn_zmq as djinn
from djinn_zmq.client.local import private_server
from djinn_zmq.client.model import Model
from djinn_zmq.engine import shapes
from djinn_zmq.probe import tables
from djinn_zmq.probe.machine import this_machine
from djinn_zmq.probe.results import Results, write
from djinn_zmq.probe.rounds import Plan, interleaved
from djinn_zmq.probe.samples import Ratio, Samples, ratio
from djinn_zmq.probe.serving import sockets_folder

SEED = 7

Case = Callable[[], object]


class Baseline:
    """The same model in this process, without Djinn: what a researcher would write by hand."""

    def __init__(self, shape: str, device: str, ids: np.ndarray) -> None:
        """ids: int64 (1, positions)."""
        self.device = torch.device(device)
        self.model = shapes.make(shape, "auto", self.device).eval()
        self.ids = torch.from_numpy(ids).to(self.device)
        self.decoder = self.model.get_decoder()
        self.layers = list(self.decoder.layers)
        self.hidden = self._hidden_states()
        pinned = self.device.type == "cuda"
        self._host = torch.empty_like(self.hidden[0], device="cpu", pin_memory=pinned)
        self._host.copy_(self.hidden[0])
        self._into = torch.empty_like(self.hidden[0])

    def _hidden_states(self) -> list[torch.Tensor]:
        """The residual after 0..L layers, each (1, positions, hidden_size)."""
        out = self.model(self.ids, use_cache=False, output_hidden_states=True, logits_to_keep=1)
        return list(out.hidden_states)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def plain(self) -> torch.Tensor:
        logits = self.model(self.ids, use_cache=False).logits
        self.wait()
        return logits

    def recompute(self, layer: int) -> None:
        """The stateless way: embedding and layers 0..N again, to have the activation."""
        self._run_layers(self.layers[:layer], self.decoder, input_ids=self.ids)

    def offload(self) -> None:
        """The hand-written way: the activation from preallocated pinned memory to the device."""
        self._into.copy_(self._host, non_blocking=True)
        self.wait()

    def rest(self, layer: int) -> None:
        """The model's own remaining layers, norm and head on an activation that is there."""
        hidden = self.hidden[layer]
        self._run_layers(self.layers[layer:], self.model, inputs_embeds=hidden)

    def _run_layers(self, layers: list[Any], module: Any, **inputs: Any) -> None:
        whole = self.decoder.layers, self.decoder.config.num_hidden_layers
        self.decoder.layers = torch.nn.ModuleList(layers)
        self.decoder.config.num_hidden_layers = len(layers)
        try:
            module(**inputs, use_cache=False)
            self.wait()
        finally:
            self.decoder.layers, self.decoder.config.num_hidden_layers = whole


def check_exact(model: Model, baseline: Baseline, ids: np.ndarray, layers: list[int]) -> int:
    """How many resumes equal the uninterrupted model of another process bit for bit: all, or it
    raises. Compares the last position's logits."""
    plain = baseline.plain()[:, -1].cpu().contiguous().view(torch.uint8).numpy().tobytes()
    points = model.run(ids, save_at=layers).checkpoints
    for layer in layers:
        if points[layer].resume().logits.tobytes() != plain:
            raise click.ClickException(f"a resume from layer {layer} differs from the plain model")
    return len(layers)


def cases_at(layer: int, model: Model, baseline: Baseline, ids: np.ndarray) -> dict[str, Case]:
    point = model.run(ids, stop_at=layer).checkpoint
    whole = np.asarray(point.hidden)
    row = np.zeros(model.hidden_size, np.float32)
    add = djinn.Add(row, at=(0, -1))
    return {
        f"{layer}: recompute to N": lambda: baseline.recompute(layer),
        f"{layer}: manual offload": baseline.offload,
        f"{layer}: the model's own rest": lambda: baseline.rest(layer),
        f"{layer}: djinn resume": point.resume,
        f"{layer}: djinn resume, row edited": lambda: point.resume([add]),
        f"{layer}: djinn resume, all replaced": lambda: point.resume(hidden=whole),
    }


def saving_cases(model: Model, baseline: Baseline, ids: np.ndarray, layer: int) -> dict[str, Case]:
    everything = range(model.num_layers + 1)
    return {
        "plain forward": baseline.plain,
        "djinn run": lambda: model.run(ids),
        f"djinn run, saves layer {layer}": lambda: model.run(ids, save_at=[layer]),
        "djinn run, saves every layer": lambda: model.run(ids, save_at=everything),
        "no-op through server and engine": model.ping,
    }


def spans_of(resume: Callable[[], djinn.Run], count: int) -> list[dict[str, Any]]:
    """Where a resume's time goes: the median of each span, in the order of the path."""
    runs = [resume().spans for _ in range(count)]
    return [
        {
            "span": f"{place}: {name}",
            "median_us": float(np.median([spans[place][1] for spans in runs])) / 1e3,
            "n": count,
        }
        for place, (name, _) in enumerate(runs[0])
    ]


def slope_ms(layers: list[int], samples: list[Samples]) -> tuple[float, float, float]:
    """Milliseconds a layer, and the 95 % interval, of a line through all samples."""
    x = np.concatenate([np.full(one.n, layer) for layer, one in zip(layers, samples, strict=True)])
    y = np.concatenate([one.seconds.reshape(-1) * 1e3 for one in samples])
    centred = x - x.mean()
    slope = float((centred * y).sum() / (centred**2).sum())
    rest = y - y.mean() - slope * centred
    error = float(np.sqrt((rest**2).sum() / (len(x) - 2) / (centred**2).sum()))
    return slope, slope - 1.96 * error, slope + 1.96 * error


def overheads(layers: list[int], by_name: dict[str, Samples]) -> list[dict[str, Any]]:
    """What a resume costs beyond the layers that must run anyway, by layer."""
    rows = []
    for layer in layers:
        resume, rest = by_name[f"{layer}: djinn resume"], by_name[f"{layer}: the model's own rest"]
        rows.append(
            {
                "layer": layer,
                "beyond_the_rest_ms": (resume.median_s - rest.median_s) * 1e3,
                "n": [resume.n, rest.n],
            }
        )
    return rows


def ratios_of(layers: list[int], by_name: dict[str, Samples], saved: int) -> list[Ratio]:
    found = [
        ratio(by_name[f"{layer}: djinn resume"], by_name[f"{layer}: the model's own rest"])
        for layer in layers
    ]
    plain = by_name["djinn run"]
    found.append(ratio(by_name[f"djinn run, saves layer {saved}"], plain, limit=1.01))
    found.append(ratio(by_name["djinn run, saves every layer"], plain, limit=1.03))
    return found


@click.command()
@click.option("--shape", default="small", show_default=True, help="Random weights of this shape.")
@click.option("--device", default="cpu", show_default=True, help='"cpu" or "cuda:N".')
@click.option("--positions", default=128, show_default=True, help="Tokens of the prompt.")
@click.option("--layers", type=int, multiple=True, help="Layers to stop at. [default: five]")
@click.option("--samples", default=20, show_default=True, help="Of each case.")
@click.option("--rounds", default=4, show_default=True, help="Turns the cases take.")
@click.option("--warm-up", default=2, show_default=True, help="Untimed calls of each case.")
@click.option(
    "--json", "path", type=click.Path(path_type=Path, dir_okay=False), help="Write results here."
)
def main(
    shape: str,
    device: str,
    positions: int,
    layers: tuple[int, ...],
    samples: int,
    rounds: int,
    warm_up: int,
    path: Path | None,
) -> None:
    """Recompute, manual offload, the model's own remaining layers, and Djinn's resume, by layer.

    \b
    recompute to N         embedding and layers 0..N again: what a stateless program pays
    manual offload         the activation from pinned memory to the device, by hand
    the model's own rest   layers N+1..L, norm and head on an activation that is in place
    djinn resume           the same through client, server and engine, to the logits in hand

    Two processes hold the same random weights: this one for the baselines, an engine for Djinn. First
    it is checked that their logits are equal bit for bit. All cases of a layer take turns.
    """
    ids = np.random.default_rng(SEED).integers(0, 1000, (1, positions))
    plan = Plan.of(samples, rounds, warm_up=warm_up, settle=1)
    with ExitStack() as stack, torch.inference_mode():
        folder = stack.enter_context(sockets_folder())
        endpoint = stack.enter_context(
            private_server(folder, device, "auto", f"--random-weights={shape}")
        )
        model = stack.enter_context(djinn.connect(endpoint, timeout_s=60)).model(shape)
        baseline = Baseline(shape, device, ids)
        deepest = model.num_layers
        chosen = sorted(set(layers)) or sorted(
            {1, deepest // 4, deepest // 2, 3 * deepest // 4, deepest}
        )
        exact = check_exact(model, baseline, ids, chosen)
        click.echo(f"{exact} of {len(chosen)} layers: resumed logits equal the plain model's bits")
        by_name: dict[str, Samples] = {}
        for layer in chosen:
            by_name |= interleaved(cases_at(layer, model, baseline, ids), plan)
            click.echo(f"layer {layer} measured")
        point = model.run(ids, stop_at=deepest).checkpoint
        spans = spans_of(point.resume, plan.samples)
        saved = chosen[len(chosen) // 2]
        by_name |= interleaved(saving_cases(model, baseline, ids, saved), plan)
        memory = {
            "activation_nbytes": int(baseline.hidden[0].nbytes),
            "layers": chosen,
            "exact_layers": exact,
        }
    results = Results(
        "resume",
        this_machine(),
        {"shape": shape, "device": device, "positions": positions, "samples": plan.samples}
        | memory,
        samples=list(by_name.values()),
        ratios=ratios_of(chosen, by_name, saved),
        tables={
            "overhead": overheads(chosen, by_name),
            "slopes": _slopes(chosen, by_name),
            f"spans of a resume after layer {deepest}": spans,
        },
    )
    report(results)
    if path is not None:
        write(results, path)


def _slopes(layers: list[int], by_name: dict[str, Samples]) -> list[dict[str, Any]]:
    if len(layers) < 3:
        return []  # no line worth its interval
    rows = []
    for what in ("recompute to N", "manual offload"):
        samples = [by_name[f"{layer}: {what}"] for layer in layers]
        value, low, high = slope_ms(layers, samples)
        n = sum(one.n for one in samples)
        rows.append({"of": what, "ms_a_layer": value, "low": low, "high": high, "n": n})
    return rows


def report(results: Results) -> None:
    click.echo(f"\n{results.machine}\n")
    click.echo(tables.of_samples("by layer", results.samples, "ms"))
    click.echo()
    click.echo(tables.of_ratios("at the medians", results.ratios))
    for title, rows in results.tables.items():
        if title.startswith("spans"):
            click.echo(f"\n{title}")
            for row in rows:
                click.echo(f"  {row['span']:<14} {row['median_us']:10.1f} us  n = {row['n']}")
    for row in results.tables["slopes"]:
        click.echo(
            f"{row['of']}: {row['ms_a_layer']:.4f} ms a layer "
            f"({row['low']:.4f} to {row['high']:.4f}), n = {row['n']}"
        )
    for row in results.tables["overhead"]:
        click.echo(
            f"layer {row['layer']}: a resume costs {row['beyond_the_rest_ms']:.2f} ms beyond the "
            f"layers that must run, n = {row['n']}"
        )


if __name__ == "__main__":
    main(prog_name="python -m bench.resume")
