"""Tests of the engine on a GPU: each is skipped by name where there is none."""

import pytest
import torch

import djinn_zmq as djinn
from djinn_zmq.client.local import private_server


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory):
    """A server with an engine on the first GPU: tiny, and a random Llama-2-13B shape."""
    folder = tmp_path_factory.mktemp("gpu")
    folder.chmod(0o700)
    with private_server(folder, "cuda:0", "auto", "--random-weights=llama-2-13b") as one:
        yield one


@pytest.fixture(scope="module")
def gpu_server(tmp_path_factory):
    """The same with all three tiers, small ones."""
    folder = tmp_path_factory.mktemp("tiers")
    folder.chmod(0o700)
    options = [
        "--gpu-memory=256",
        "--host-memory=256",
        f"--state={folder / 'state'}",
        "--disk=2048",
    ]
    with private_server(folder, "cuda:0", "auto", "--random-weights=llama-2-13b", *options) as one:
        yield one


@pytest.fixture
def tiered(gpu_server):
    with djinn.connect(gpu_server, timeout_s=60) as one:
        yield one


@pytest.fixture
def gpu_folder(tmp_path_factory):
    def make():
        folder = tmp_path_factory.mktemp("own")
        folder.chmod(0o700)
        return folder

    return make
