"""Hugging Face programs on served models: the client's edge, and the one part of it that needs torch.

    model = RemoteCausalLM.from_pretrained("tiny")     # of your own server, or endpoint="tcp://host:5556"
    model.generate(**tokenizer_of("tiny")("the capital of", return_tensors="pt"))

`djinn exec script.py` gives unmodified programs such models.
"""

from djinn_zmq.hf.caches import RemoteCache
from djinn_zmq.hf.models import RemoteCausalLM
from djinn_zmq.hf.opening import tokenizer_of

__all__ = ["RemoteCache", "RemoteCausalLM", "tokenizer_of"]
