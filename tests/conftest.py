"""What all tests share: one thread, and ``import reference`` from any folder."""

import os

import hypothesis
import pytest
import torch

pytest_plugins = ["tests.chaos.table"]

os.environ.pop("RAY_ADDRESS", None)  # tests bring a cluster of their own
if "FLSPLIT_TEST_GPU" not in os.environ:  # `make test-gpu` has it
    # Bit-equality is asked for between what is computed here and what a test computes itself, on
    # the processor.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
hypothesis.settings.register_profile("thorough", max_examples=1000)  # for `make fuzz`

END_TO_END_TIMEOUT = 900  # seconds; a test takes one or two minutes unless the machine is slow


def pytest_collection_modifyitems(items):
    """Give tests that start Flower more time than the others."""
    for item in items:
        if item.get_closest_marker("e2e"):
            item.add_marker(pytest.mark.timeout(END_TO_END_TIMEOUT))


@pytest.fixture(autouse=True)
def _one_thread():
    """One and two threads differ in the last bits, and small tensors are faster on one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
