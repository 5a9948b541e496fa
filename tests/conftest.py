"""What all tests share: one thread, and ``import reference`` from any folder."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread():
    """One and two threads differ in the last bits, and small tensors are faster on one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
