"""Tests of the engine on a GPU: each is skipped by name where there is none.

Those that ask for `watched` can be tried without one: DJINN_TEST_DEVICE=cpu.
"""

import os

import pytest
import torch

import djinn_zmq as djinn
from djinn_zmq.client.local import private_server
from tests.gpu.plain import Watched

DEVICE = os.environ.get("DJINN_TEST_DEVICE", "cuda:0")


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        tried = DEVICE == "cpu" and "watched" in item.fixturenames
        if item.get_closest_marker("gpu") and not tried:
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


@pytest.fixture(scope="session")
def watched(tmp_path_factory):
    """A server with little memory on the device, and its models' untouched copies in this process."""
    folder, sources = tmp_path_factory.mktemp("watched"), tmp_path_factory.mktemp("models")
    folder.chmod(0o700)
    options = ["--gpu-memory=64", "--host-memory=512"]
    if DEVICE == "cpu":
        options.append("--threads=1")  # their number shows in the last bit
        torch.set_num_threads(1)
    with private_server(folder, DEVICE, "auto", *options) as endpoint:
        yield Watched(endpoint, torch.device(DEVICE), sources)


@pytest.fixture
def watching(watched):
    """A connection to it, in inference mode as the engine is."""
    with torch.inference_mode(), watched.connect() as one:
        yield one
