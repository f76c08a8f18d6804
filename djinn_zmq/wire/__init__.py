"""What travels: messages, tensors, edits, and their bytes. No sockets here, no clocks, no torch."""
