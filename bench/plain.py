"""The same model in this process, without Djinn: what all baselines are measured on."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import transformers

from djinn_zmq.engine.models import shapes
from djinn_zmq.errors import RequestError
from djinn_zmq.probe.device_time import waits
from djinn_zmq.server.catalog import Catalog


class Plain:
    """ids: int64 (1, positions), on the device. hidden: the residual after 0..L layers, each
    (1, positions, hidden_size)."""

    def __init__(self, source: str, dtype: str, device: str, ids: np.ndarray, threads: int) -> None:
        """source: of the served model: "random:SHAPE", a directory or a hub id."""
        self.device = torch.device(device)
        self.cuda = self.device.type == "cuda"
        if not self.cuda:  # the number shows in a CPU's last bits: as many as the engine
            torch.set_num_threads(threads)
        self.wait = waits(self.device)
        self.model = _model(source, dtype, self.device)
        self.ids = torch.from_numpy(ids).to(self.device)
        if self.cuda:
            self.model.register_forward_pre_hook(_steps_reproducibly, with_kwargs=True)
        self.decoder = self.model.get_decoder()
        self.layers = list(self.decoder.layers)
        self.hidden = self._hidden_states()
        self.activation_nbytes = int(self.hidden[0].nbytes)

    def _hidden_states(self) -> list[torch.Tensor]:
        """By hooks, not by `output_hidden_states`: that one norms the last of them."""
        hidden: list[torch.Tensor] = []

        def before_first(_: Any, args: Any, kwargs: Any) -> None:
            hidden.append(args[0] if args else kwargs["hidden_states"])

        def after(_: Any, args: Any, out: Any) -> None:
            hidden.append(out[0] if isinstance(out, tuple) else out)

        hooks = [self.layers[0].register_forward_pre_hook(before_first, with_kwargs=True)]
        hooks += [layer.register_forward_hook(after) for layer in self.layers]
        try:
            self.model(self.ids, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        return hidden

    def forward(self) -> torch.Tensor:
        """The uninterrupted model: logits (1, positions, vocab), done when it returns."""
        logits: torch.Tensor = self.model(self.ids, use_cache=False).logits
        self.wait()
        return logits

    def forward_keeping_all(self) -> None:
        """What a researcher writes by hand: every layer's output stays on the device."""
        self.model(self.ids, use_cache=False, output_hidden_states=True)
        self.wait()

    def up_to(self, layer: int, *, wait: bool = True) -> None:
        """Layers 0..N, 0 the embedding: what has to be run again to have the activation."""
        self._run(self.layers[:layer], self.decoder, wait, input_ids=self.ids)

    def from_layer(
        self, layer: int, hidden: torch.Tensor | None = None, *, wait: bool = True
    ) -> None:
        """Layers N+1..L, norm and head, on *hidden*; None: what came out of layer N, in its place."""
        hidden = self.hidden[layer] if hidden is None else hidden
        self._run(self.layers[layer:], self.model, wait, inputs_embeds=hidden)

    def _run(self, layers: Sequence[Any], module: Any, wait: bool, **inputs: Any) -> None:
        whole = self.decoder.layers, self.decoder.config.num_hidden_layers
        self.decoder.layers = torch.nn.ModuleList(layers)
        self.decoder.config.num_hidden_layers = len(layers)
        try:
            module(**inputs, use_cache=False)
            if wait:
                self.wait()
        finally:
            self.decoder.layers, self.decoder.config.num_hidden_layers = whole

    def give_back(self) -> None:
        """The weights and the activations: nothing can be run any more."""
        del self.model, self.decoder, self.layers
        self.hidden.clear()
        if self.cuda:
            torch.cuda.empty_cache()

    def last_logits(self) -> bytes:
        """The bits of the last position's logits."""
        return bits(self.forward()[:, -1])


def _steps_reproducibly(_: Any, args: Any, options: dict[str, Any]) -> None:
    """Forwards over a past take PyTorch's own attention: cuDNN's gives other bits each time."""
    past = options.get("past_key_values")
    over_past = past is not None and past.get_seq_length() > 0
    torch.backends.cuda.enable_cudnn_sdp(not over_past)


def device_of(asked: str, served: str | None = None) -> str:
    """The device to measure on. asked: "cpu", "cuda:N" or "auto": that of *served*, the model's of a
    server that runs already, else a GPU where there is one. Raises RequestError where it is not here.
    """
    count = torch.cuda.device_count()
    chosen = (served or ("cuda:0" if count else "cpu")) if asked == "auto" else asked
    if chosen != "cpu" and (torch.device(chosen).index or 0) >= count:
        raise RequestError(
            f'there is no GPU here that this program can use for "{chosen}": say cpu'
        )
    return chosen


def config_of(model: str) -> Any:
    """The transformers configuration of a shape, a served name, a directory or a hub id."""
    if model in shapes.names():
        return shapes.config_of(model)
    source = Catalog((model,)).resolve(model, trusted=True)[1]
    return transformers.AutoConfig.from_pretrained(source).get_text_config()


def kv_shape(config: Any, positions: int) -> tuple[int, int, int, int]:
    """Of one layer's keys, or values: (1, kv_heads, positions, head_dim)."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 1, heads, positions, width


def kv_nbytes(config: Any, positions: int, layers: int) -> int:
    """Of the keys and values of *layers* layers, in the dtype of the configuration."""
    return 2 * layers * math.prod(kv_shape(config, positions)) * config.dtype.itemsize


def bits(data: torch.Tensor) -> bytes:
    return data.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()


def _model(source: str, dtype: str, device: torch.device) -> Any:
    wanted = "auto" if dtype == "auto" else getattr(torch, dtype)
    if source.startswith(shapes.PREFIX):
        return shapes.make(source.removeprefix(shapes.PREFIX), wanted, device).eval()
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=wanted)
    return model.to(device).eval()
