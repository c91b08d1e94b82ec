"""The Triton kernels run in Triton's interpreter unless there is a CUDA device.

The variable has to be set before the kernels are imported, so it is set here, when pytest collects this folder.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Every uninitialised floating tensor is full of NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)
