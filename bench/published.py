"""The prototype's own published figures, kept apart from everything measured here.

Source: the prototype's experiment 3, "Resume Latency & Scalability": one H100, Llama-2-13B, layers 1
to 40; asyncio TCP and pickled tensors. Another GPU, another prompt's length, another machine: they
give a scale, not a comparison.
"""

HARDWARE = "H100, published with the prototype"
MODEL = "llama-2-13b"
# milliseconds by layer
RECOMPUTE_MS = {1: 2.1, 20: 33.3, 40: 65.4}
OFFLOAD_MS = {1: 0.8, 20: 0.8, 40: 0.8}
RESUME_MS = {1: 35.0, 20: 35.0, 40: 35.0}  # "~35", 30-50: expected by its authors, not measured
