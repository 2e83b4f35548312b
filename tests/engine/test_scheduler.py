"""RequestScheduler case by case; see scheduler_harness.py for what is checked in every step."""

from __future__ import annotations

import pytest
from fake_model import expected_output, request
from scheduler_harness import Harness

from moeserve.core import EngineRequest, ErrorCode, FinishReason, RequestError


@pytest.mark.parametrize("admission", ["past_future", "aggressive", "conservative"])
@pytest.mark.parametrize("reuse", [True, False])
def test_a_crowd_in_a_small_pool_all_finish(admission: str, reuse: bool) -> None:
    harness = Harness(12, 2, reuse, admission=admission, max_batch_tokens=7, max_running=5)
    for number in range(40):
        prompt = [1 + number % 2] * (1 + number % 5)
        harness.add(request(f"r{number}", prompt, 3 + number % 16, ignore_eos=True))
    harness.finish()
    preemptions = harness.scheduler.stats().num_preemptions
    assert (preemptions == 0) == (admission == "conservative")


def test_decodes_run_beside_a_long_prompt() -> None:
    harness = Harness(20, 2, max_batch_tokens=4)
    harness.add(request("short", [1], 10, ignore_eos=True))
    harness.step()
    harness.add(request("long", [2] * 14, 2, ignore_eos=True))
    sizes = []
    while "long" not in harness.ended:
        batch = harness.schedule()
        assert batch is not None
        sizes.append([(c.sequence.request_id, c.num_tokens, c.samples) for c in batch.chunks])
        harness.commit(batch)
    for step in sizes[:4]:
        assert step[0] == ("short", 1, True)
        assert step[1] == ("long", 3, False)
    assert sizes[4] == [("short", 1, True), ("long", 2, True)]
    harness.finish()


def test_priority_decides_who_starts_and_arrival_among_equals() -> None:
    harness = Harness(max_running=1)
    for name, priority in (("late", 5), ("first", 0), ("second", 0), ("urgent", -1)):
        harness.add(request(name, [1], 1, priority=priority))
    harness.finish()
    assert list(harness.ended) == ["urgent", "first", "second", "late"]


@pytest.mark.parametrize("overtaking", [0, 1, 2, 5])
def test_a_long_prompt_is_overtaken_so_often_and_then_starts(overtaking: int) -> None:
    """`running` holds 4 of 8 blocks, so `long` has to wait for its end, and small ones need not."""
    harness = Harness(8, 2, admission="aggressive", overtaking=overtaking, max_batch_tokens=16)
    harness.add(request("running", [1] * 7, 2, ignore_eos=True))
    harness.step()
    harness.add(request("long", [2] * 15, 1))
    for number in range(4):
        harness.add(request(f"small{number}", [1, 2], 1, priority=number == 3))
    harness.finish()
    before = list(harness.ended).index("long")
    assert before == 1 + min(overtaking, 3)  # the last is less urgent: it overtakes nobody


def test_a_preempted_request_is_not_overtaken() -> None:
    harness = Harness(8, 2, admission="aggressive", overtaking=8, max_batch_tokens=16)
    harness.add(request("first", [1] * 6, 9, ignore_eos=True))
    harness.add(request("victim", [2] * 6, 9, ignore_eos=True))
    while not harness.scheduler.stats().num_preemptions:
        harness.step()
    harness.add(request("small", [1, 2], 1))
    assert harness.blocks.num_available > 1
    while harness.scheduler.num_waiting == 2:
        harness.step()
    assert "first" in harness.ended
    harness.finish()


def test_the_least_urgent_gives_way() -> None:
    harness = Harness(6, 2, admission="aggressive", max_batch_tokens=16)
    harness.add(request("low", [1, 2, 1, 2], 8, priority=1, ignore_eos=True))
    harness.add(request("high", [2, 2, 2, 2], 8, priority=0, ignore_eos=True))
    sequences = dict(harness.scheduler._sequences)
    harness.finish()
    assert sequences["low"].num_preemptions >= 1
    assert sequences["high"].num_preemptions == 0
    assert list(harness.ended) == ["high", "low"]


def test_next_turn_reuses_prompt_and_answer() -> None:
    harness = Harness(30, 2)
    harness.add(request("turn1", [1, 2, 1, 2, 1], 6, ignore_eos=True))
    harness.finish()
    history = [1, 2, 1, 2, 1, *harness.output["turn1"]]  # 11 tokens, 10 of them have kv
    harness.add(request("turn2", [*history, 2], 2, ignore_eos=True))
    harness.finish()
    assert harness.ended["turn2"].num_cached_tokens == 10
    assert harness.scheduler.stats().cached_prompt_tokens == 10


def test_a_fully_indexed_prompt_still_computes_its_last_token() -> None:
    harness = Harness(30, 2)
    for name in ("one", "two"):
        harness.add(request(name, [1, 2, 1, 2], 1))
        harness.finish()
    assert harness.ended["two"].num_cached_tokens == 2  # not 4: the last block is computed anew


def test_preempted_blocks_are_found_again() -> None:
    recomputed = {}
    for reuse in (True, False):
        harness = Harness(8, 2, reuse, admission="aggressive", max_batch_tokens=16)
        for number in (1, 2):
            harness.add(request(f"r{number}", [number] * 6, 9, ignore_eos=True))
        harness.finish()
        stats = harness.scheduler.stats()
        assert stats.num_preemptions == 1
        recomputed[reuse] = stats.extra["recomputed_tokens"]
    assert 0 < recomputed[True] < recomputed[False]


def test_scored_prompts_reuse_nothing_but_may_be_reused() -> None:
    harness = Harness(30, 2)
    for name, logprobs in (("plain", None), ("scored", 0), ("after", None)):
        harness.add(request(name, [1, 2, 1, 2, 1], 0, prompt_logprobs=logprobs))
        harness.finish()
    cached = {name: delta.num_cached_tokens for name, delta in harness.ended.items()}
    assert cached == {"plain": 0, "scored": 0, "after": 4}
    scores = harness.ended["scored"].prompt_logprobs
    assert scores is not None
    assert len(scores) == 5


def test_max_tokens_zero_ends_without_a_token() -> None:
    harness = Harness()
    harness.add(request("score", [1, 2, 1], 0))
    harness.finish()
    end = harness.ended["score"]
    assert (end.token_ids, end.finish_reason) == ([], FinishReason.LENGTH)


def test_stop_token_ids_end_and_are_named() -> None:
    harness = Harness()
    undisturbed = expected_output(request("x", [1], 8, ignore_eos=True))
    stop = undisturbed[3]
    harness.add(request("x", [1], 8, ignore_eos=True, stop_token_ids=(stop,)))
    while harness.scheduler.has_work:
        harness.step()
    assert harness.output["x"] == undisturbed[: undisturbed.index(stop) + 1]
    assert harness.ended["x"].stop_token_id == stop


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_deadline_ends_a_request_wherever_it_is(steps: int) -> None:
    """Waiting, in the middle of its prompt, in decode."""
    harness = Harness(max_batch_tokens=4)
    harness.add(request("x", [1] * 8, 9, ignore_eos=True, deadline_s=steps + 0.5))
    for _ in range(steps):
        harness.step()
    harness.step()
    assert harness.ended["x"].finish_reason is FinishReason.DEADLINE
    assert not harness.scheduler.has_work
    assert harness.scheduler.stats().kv_blocks_used == 0


def test_deadline_of_a_reused_name_is_not_the_old_one() -> None:
    harness = Harness()
    harness.add(request("x", [1], 1, deadline_s=3.0))
    harness.step()
    assert harness.ended.pop("x").finish_reason is not FinishReason.DEADLINE
    harness.output.clear()
    harness.add(request("x", [1], 10, ignore_eos=True))
    while harness.scheduler.has_work:
        harness.step()
    assert harness.ended["x"].finish_reason is FinishReason.LENGTH


def test_abort_in_the_middle_of_a_prompt_keeps_what_is_computed_for_others() -> None:
    harness = Harness(30, 2, max_batch_tokens=4)
    harness.add(request("gone", [1] * 12, 4))
    harness.step()
    harness.take(harness.scheduler.abort("gone", FinishReason.CANCELLED, harness.now_s))
    assert harness.scheduler.stats().kv_blocks_used == 0
    harness.add(request("next", [1] * 12, 4))
    harness.finish()
    assert harness.ended["next"].num_cached_tokens == 4


def test_an_uncommitted_step_can_be_scheduled_again() -> None:
    harness = Harness(max_batch_tokens=4)
    harness.add(request("x", [1, 2] * 4, 3, ignore_eos=True))
    first, second = harness.schedule(), harness.schedule()
    assert first is not None
    assert second is not None
    assert [(c.start, c.stop) for c in first.chunks] == [(c.start, c.stop) for c in second.chunks]
    harness.commit(second)
    harness.finish()


@pytest.mark.parametrize(
    ("new", "code", "message"),
    [
        (request("a", [], 1), ErrorCode.INVALID, "no tokens"),
        (request("a", [1] * 20, 5), ErrorCode.CONTEXT_LENGTH, "context of 24"),
        (request("a", [1] * 8, 6), ErrorCode.CONTEXT_LENGTH, "need 7 kv blocks.*pool has 6"),
        (request("taken", [1], 1), ErrorCode.INVALID, "in use"),
    ],
)
def test_requests_that_can_never_run_are_refused(
    new: EngineRequest, code: ErrorCode, message: str
) -> None:
    harness = Harness(6, 2)
    harness.add(request("taken", [1], 1))
    with pytest.raises(RequestError, match=message) as caught:
        harness.add(new)
    assert caught.value.code is code
    harness.finish()


def test_a_request_that_just_fits_the_pool_runs() -> None:
    harness = Harness(6, 2)
    harness.add(request("x", [1] * 8, 5, ignore_eos=True))  # 12 tokens of kv: the last needs none
    harness.finish()
    assert len(harness.output["x"]) == 5


def test_a_full_queue_is_refused_as_overloaded() -> None:
    harness = Harness(max_waiting=2)
    for number in range(2):
        harness.add(request(str(number), [1], 1))
    with pytest.raises(RequestError, match="at most 2") as caught:
        harness.add(request("2", [1], 1))
    assert caught.value.code is ErrorCode.OVERLOADED
    harness.finish()
