"""The device an engine owns: how tensors get into and out of its memory. All that speaks of CUDA."""
