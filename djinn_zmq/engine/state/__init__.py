"""What an engine keeps: checkpoints, keys and values, and where they are: device, host memory, disk."""
