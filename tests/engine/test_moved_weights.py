"""An engine whose weights move into huge pages computes what one does that reads the page cache."""

from __future__ import annotations

import random
from pathlib import Path

from support.engine_answers import answers, make_engine, make_requests
from support.randomness import fresh_seed

from moeserve.cpu_backend.machine import huge_page_mode


def test_same_bits_before_while_and_after(packed: Path) -> None:
    requests = make_requests(random.Random(fresh_seed()), 256)
    left = make_engine(packed, huge_pages=False)
    expected = answers(left, requests)
    assert left.stats().pages is None
    left.close()
    engine = make_engine(packed)
    assert answers(engine, requests) == expected
    engine.page_mover.wait()
    assert answers(engine, requests) == expected
    pages = engine.stats().pages
    assert pages is not None
    assert not pages.moving
    assert pages.mapped_bytes == sum(path.stat().st_size for path in packed.glob("packed-*"))
    if huge_page_mode() in ("always", "madvise") and not pages.problem:
        assert pages.cached_huge_bytes + pages.moved_bytes > 0
    engine.close()


def test_weights_in_memory_of_the_process_do_not_move(packed: Path) -> None:
    """A tier has copied them."""
    engine = make_engine(packed, host_slots=1 << 10)
    assert engine.stats().pages is None
    engine.close()
