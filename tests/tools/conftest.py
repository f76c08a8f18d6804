from tests.bench.conftest import lend, served, unpinned

__all__ = ["lend", "served", "unpinned"]
