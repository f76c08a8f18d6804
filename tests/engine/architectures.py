"""Tiny models of random weights, one of each architecture that is served.

Windows are shorter than PROMPT_LENGTH where the architecture has them, and layers of both kinds
alternate, so that masks really differ from layer to layer. Values are drawn large enough that a
wrong mask, a lost residual or a swapped layer shows in the logits.
"""

from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

VOCAB_SIZE = 99
PROMPT_LENGTH = 11
WINDOW = 4
SEED = 20

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_HEAD = {"head_dim": 8}
_SLIDING = {"sliding_window": WINDOW}
_ALTERNATING = {
    **_SLIDING,
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
_EXPERTS = {"num_experts_per_tok": 2}
_GPT = {
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_inner": 48,
    "n_positions": 64,
    "vocab_size": VOCAB_SIZE,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# name: (transformers' configuration class, what it is given)
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaConfig", _SIZES),
    "Mistral": ("MistralConfig", _SIZES | _HEAD | _SLIDING),
    "Ministral": ("MinistralConfig", _SIZES | _HEAD | _ALTERNATING),
    "Qwen2": (
        "Qwen2Config",
        _SIZES | _ALTERNATING | {"use_sliding_window": True, "max_window_layers": 0},
    ),
    "Qwen3": (
        "Qwen3Config",
        _SIZES | _HEAD | _ALTERNATING | {"use_sliding_window": True, "max_window_layers": 0},
    ),
    "Qwen3Moe": (
        "Qwen3MoeConfig",
        _SIZES
        | _HEAD
        | _EXPERTS
        | {"num_experts": 4, "moe_intermediate_size": 16, "mlp_only_layers": [1]},
    ),
    "Gemma": ("GemmaConfig", _SIZES | _HEAD),
    "Gemma2": ("Gemma2Config", _SIZES | _HEAD | _ALTERNATING),
    "Gemma3Text": ("Gemma3TextConfig", _SIZES | _HEAD | _ALTERNATING),
    "Phi": ("PhiConfig", _SIZES),
    "Phi3": ("Phi3Config", _SIZES | _SLIDING),
    "Olmo": ("OlmoConfig", _SIZES | {"clip_qkv": 2.0}),
    "Olmo2": ("Olmo2Config", _SIZES),
    "Olmo3": ("Olmo3Config", _SIZES | _ALTERNATING),
    "GPTNeoX": ("GPTNeoXConfig", _SIZES),
    "GPT2": ("GPT2Config", _GPT),
    "GPTJ": ("GPTJConfig", _GPT | {"rotary_dim": 4}),
    "GPTNeo": (
        "GPTNeoConfig",
        {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_layers": 4,
            "attention_types": [[["global", "local"], 2]],
            "num_heads": 4,
            "window_size": WINDOW,
            "max_position_embeddings": 64,
            "vocab_size": VOCAB_SIZE,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "GPTBigCode": ("GPTBigCodeConfig", _GPT | {"multi_query": True}),
    "OPT": (
        "OPTConfig",
        {
            "hidden_size": 32,
            "ffn_dim": 48,
            "word_embed_proj_dim": 24,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "vocab_size": VOCAB_SIZE,
            "pad_token_id": 0,
        },
    ),
    "Bloom": (
        "BloomConfig",
        {"hidden_size": 32, "n_layer": 3, "n_head": 4, "vocab_size": VOCAB_SIZE},
    ),
    "Falcon": (
        "FalconConfig",
        {
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_kv_heads": 2,
            "new_decoder_architecture": True,
            "alibi": False,
            "vocab_size": VOCAB_SIZE,
            "max_position_embeddings": 64,
        },
    ),
    "SmolLM3": ("SmolLM3Config", _SIZES | {"no_rope_layers": [1, 0, 1]}),
    "Starcoder2": ("Starcoder2Config", _SIZES | _SLIDING),
    "Granite": (
        "GraniteConfig",
        _SIZES
        | {
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.0,
            "residual_multiplier": 0.7,
            "attention_multiplier": 0.2,
        },
    ),
    "Cohere": ("CohereConfig", _SIZES | {"use_qk_norm": True}),
    "Cohere2": ("Cohere2Config", _SIZES | _HEAD | _ALTERNATING),
    "Mixtral": ("MixtralConfig", _SIZES | _EXPERTS | _SLIDING | {"num_local_experts": 4}),
    "GptOss": ("GptOssConfig", _SIZES | _HEAD | _ALTERNATING | _EXPERTS | {"num_local_experts": 4}),
    "Lfm2": (
        "Lfm2Config",
        _SIZES | {"layer_types": ["conv", "full_attention", "conv"], "block_multiple_of": 16},
    ),
    "Glm": ("GlmConfig", _SIZES | _HEAD),
    "Glm4": ("Glm4Config", _SIZES | _HEAD),
}

NAMES = list(_CONFIGS)


def tiny_model(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model of architecture *name*, the same weights at every call, in eval mode on the CPU."""
    config_class, given = _CONFIGS[name]
    config = getattr(transformers, config_class)(**given)
    generator = torch.Generator().manual_seed(SEED)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for weights in model.parameters():
            if weights.ndim > 1:
                drawn = torch.randn(weights.shape, generator=generator) / weights.shape[-1] ** 0.5
            else:  # norms and biases
                drawn = 0.1 * torch.randn(weights.shape, generator=generator)
                drawn += weights.float().round()
            weights.copy_(drawn)
    return model.eval()


def prompts(batch: int, length: int = PROMPT_LENGTH) -> torch.Tensor:
    """Token ids, int64 (batch, length), the same at every call."""
    generator = torch.Generator().manual_seed(batch * 1000 + length)
    return torch.randint(0, VOCAB_SIZE, (batch, length), generator=generator)
