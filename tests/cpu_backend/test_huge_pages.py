"""Pages that take the place of others."""

from __future__ import annotations

import errno
import mmap

import numpy as np
import pytest
from support.randomness import fresh_seed

from moeserve.cpu_backend import _native

PAGE = mmap.PAGESIZE


def anonymous(num_pages: int) -> np.ndarray:
    return np.frombuffer(mmap.mmap(-1, num_pages * PAGE, flags=mmap.MAP_PRIVATE), np.uint8)


def test_moved_pages_stand_where_the_others_did() -> None:
    rng = np.random.default_rng(fresh_seed())
    source, target = anonymous(4), anonymous(8)
    source[:], target[:] = rng.integers(1, 256, 4 * PAGE), 7
    expected = source.copy()
    _native.move_pages(source[PAGE:], target[3 * PAGE : 6 * PAGE])
    assert np.array_equal(target[3 * PAGE : 6 * PAGE], expected[PAGE:])
    assert (target[: 3 * PAGE] == 7).all()
    assert (target[6 * PAGE :] == 7).all()
    assert np.array_equal(source[:PAGE], expected[:PAGE])
    assert not source[PAGE:].any(), "the source can be used again"
    source[PAGE:] = 9
    assert np.array_equal(target[3 * PAGE : 6 * PAGE], expected[PAGE:])


def test_given_back_pages_are_zeros() -> None:
    pages = anonymous(3)
    pages[:] = 5
    _native.drop_pages(pages[PAGE : 2 * PAGE])
    assert not pages[PAGE : 2 * PAGE].any()
    assert (pages[:PAGE] == 5).all()
    assert (pages[2 * PAGE :] == 5).all()


def test_what_cannot_be_moved_is_refused() -> None:
    source, target = anonymous(2), anonymous(2)
    with pytest.raises(ValueError, match=r"target: shape \[4096\], expected \[8192\]"):
        _native.move_pages(source, target[:PAGE])
    for bad in (target[1 : PAGE + 1], target[: PAGE - 1]):
        with pytest.raises(ValueError, match="target: is not made of whole pages of "):
            _native.move_pages(source[:PAGE], bad)
        with pytest.raises(ValueError, match="source: is not made of whole pages of "):
            _native.move_pages(bad, target[:PAGE])
        with pytest.raises(ValueError, match="pages: is not made of whole pages of "):
            _native.drop_pages(bad)
        with pytest.raises(ValueError, match="pages: is not made of whole pages of "):
            _native.is_huge(bad)
    with pytest.raises(TypeError):
        _native.move_pages(source.astype(np.int32), target)
    with pytest.raises(TypeError):  # not in one piece
        _native.move_pages(source[::2], target[::2])
    with pytest.raises(OSError, match="Invalid argument") as caught:  # a page onto itself
        _native.move_pages(source, source)
    assert caught.value.errno == errno.EINVAL


def test_small_pages_are_not_huge() -> None:
    """One page cannot be; and memory in which huge pages are forbidden."""
    mapping = mmap.mmap(-1, 8 << 20, flags=mmap.MAP_PRIVATE)
    mapping.madvise(mmap.MADV_NOHUGEPAGE)
    memory = np.frombuffer(mapping, np.uint8)
    assert not _native.is_huge(memory)
    assert not _native.is_huge(memory[:PAGE])
