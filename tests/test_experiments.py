"""Capacity, sharing and whole blocks, counted by hand."""

from __future__ import annotations

import pytest

from pagedlit.serving.cost_model import get_cost_model
from pagedlit.serving.experiments import all_at_once, capacity, saved_by_sharing, whole_blocks
from pagedlit.serving.simulator import simulate
from pagedlit.serving.workload import Request, Span, conversations, synthetic

COST = get_cost_model("A100-40G", "OPT-13B")


def test_capacity_is_what_is_served_while_all_wait():
    load = list(synthetic(60, 0.1, "alpaca"))
    report = simulate(all_at_once(load), COST)
    assert capacity(load, COST) == 60 / report.seconds > 10 * 60 / simulate(load, COST).seconds
    assert capacity([], COST) == 0


@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("num_prompt", [32, 40])
def test_sharing_saves_the_blocks_of_the_prompt(n, num_prompt):
    """In the first step one table names the prompt's blocks. From then on n tables do, and each has a last block of its own."""
    saved = saved_by_sharing([Request(0.0, (Span(1, num_prompt),), 8, n=n)], COST, block_size=16, enable_prefix_caching=False)
    in_table, at_first = -(-(num_prompt + 7) // 16), -(-num_prompt // 16)  # blocks; all 7 steps that write fit into one more block, or none
    named = at_first + 7 * n * in_table
    held = at_first + 7 * (num_prompt // 16 + n * (in_table - num_prompt // 16))
    assert saved == pytest.approx(1 - held / named)


def test_no_prompt_no_saving():
    assert saved_by_sharing([], COST) == 0
    assert saved_by_sharing(synthetic(30, 2.0, "alpaca"), COST, enable_prefix_caching=False) == 0


@pytest.mark.parametrize("size", [4, 16, 64])
def test_whole_blocks_hit_whole_blocks(size):
    """The same system prompt before every question, one at a time."""
    trace = [Request(100.0 * i, (Span(0, 100), Span(10 + i, 20)), 4) for i in range(6)]
    options = {"num_blocks": 4096 // size, "block_size": size}
    assert simulate(trace, COST, **options).num_hit_tokens == 5 * 100
    assert simulate(trace, COST, memory=whole_blocks, **options).num_hit_tokens == 5 * (100 // size * size)
    assert simulate(trace, COST, memory=whole_blocks, enable_prefix_caching=False, **options).num_hit_tokens == 0


def test_sleeping_changes_nothing_with_whole_blocks():
    load = list(conversations(15, 1.0, num_shared_tokens=50, seed=1))
    plain, jumped = (simulate(load, COST, memory=whole_blocks, num_blocks=400, jump=jump) for jump in (False, True))
    assert plain == jumped and plain.num_hit_tokens > 0
