"""Shared memory: sealed memfds cut into slots that have generations, leases and one owner each."""
