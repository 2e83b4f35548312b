"""What is put off is done once, in its order, and never too much of it waits."""

from __future__ import annotations

import random
from functools import partial

from support.randomness import fresh_seed

from moeserve.chores import Chores, at_once


def test_everything_in_order_and_no_more_waits_than_may() -> None:
    rng = random.Random(fresh_seed())
    most = rng.randint(0, 6)
    chores = Chores(most)
    done: list[int] = []
    given = 0
    for _ in range(200):
        if rng.random() < 0.7:
            chores.put_off(partial(done.append, given))
            given += 1
        else:
            limit = len(done) + rng.randint(0, 4)
            waiting = len(chores)
            chores.do_while(lambda limit=limit: len(done) < limit)
            assert len(done) == min(limit, given) or waiting == 0
        assert len(chores) <= most
        assert done == list(range(given - len(chores)))
    chores.do_while(lambda: True)
    assert done == list(range(given))


def test_at_once() -> None:
    done: list[int] = []
    at_once(partial(done.append, 1))
    assert done == [1]
