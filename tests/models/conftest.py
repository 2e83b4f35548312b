"""Fixtures of tests that draw models of transformers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.randomness import fresh_seed


@pytest.fixture(scope="module")
def quiet() -> Iterator[None]:
    """Nothing on the terminal from transformers, and one thread for its models."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def seed() -> int:
    return fresh_seed()
