"""The process that owns sockets, sessions, shared arenas and the engines' lives. Without torch."""
