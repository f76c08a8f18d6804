"""The engine's own conditions: one thread, inference mode; and no look at a hub."""

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module", autouse=True)
def _as_in_the_engine() -> Iterator[None]:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    threads = torch.get_num_threads()
    # At these sizes a second thread only waits, and where other work keeps its core busy, long.
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        yield
    transformers.utils.logging.enable_progress_bar()
    transformers.utils.logging.set_verbosity_warning()
    torch.set_num_threads(threads)
