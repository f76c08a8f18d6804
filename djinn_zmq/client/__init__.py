"""The library a user imports: numpy, pyzmq, msgspec. Without torch."""
