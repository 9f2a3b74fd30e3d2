"""Contiguous memories in the simulator's loop: sleeping changes nothing, ranges and runners are the same, and the books add up."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagedlit.memory.contiguous import next_power_of_two
from pagedlit.serving.cost_model import DEVICES, MODELS, CostModel
from pagedlit.serving.policy import LongestPrefixMatch, get_policy
from pagedlit.serving.reservation import AMOUNTS, PLACEMENTS, Reserve, one_by_one
from pagedlit.serving.scheduler import SchedulingPolicy
from pagedlit.serving.simulator import Report, Setting, Simulation, run, simulate
from pagedlit.serving.workload import Request, Span, synthetic

COST = CostModel(DEVICES["A100-40G"], MODELS["OPT-13B"])


def random_trace(rng: random.Random, num_requests: int = 25) -> list[Request]:
    """Bursts and pauses, several answers, and some that can never fit."""
    now, trace = 0.0, []
    for index in range(num_requests):
        now += rng.choice([0, 0, 0, 0.01, 0.05, 0.3, 2.0])
        num_tokens = rng.randint(1, 25) if rng.random() < 0.95 else 4000
        trace.append(Request(now, (Span(100 + index, num_tokens),), rng.choice([1, 2, 3, 10, 40]), rng.choice([1, 1, 1, 2])))
    return trace


def random_setting(rng: random.Random, jump: bool) -> Setting:
    """A small memory, and few seats or many."""
    num_seqs, policy = rng.choice([1, 2, 5, 20]), rng.choice(["priority", "fcfs", "lpm", "impatient"])
    inner: SchedulingPolicy = LongestPrefixMatch(patience=3, window=2) if policy == "impatient" else get_policy(policy)
    limits = {
        "max_num_seqs": num_seqs, "max_num_batched_tokens": num_seqs + rng.choice([0, 1, 7, 64]),
        "max_prefill_chunk": rng.choice([None, 1, 5, 512]), "max_model_len": rng.choice([30, 70]),
    }  # fmt: skip
    return Setting(COST, rng.randint(70, 300), 1, inner, None, False, jump, limits)


def random_run(seed: int, jump: bool) -> Simulation:
    """The same run for the same seed."""
    rng = random.Random(seed)
    memory = Reserve(rng.choice(list(AMOUNTS)), rng.choice(list(PLACEMENTS)))
    return memory(random_trace(rng), random_setting(rng, jump))


class Checked(Simulation):
    """A simulation that checks itself between steps."""

    def advance(self) -> None:
        super().advance()
        memory, scheduler = self.memory, self.scheduler
        scheduler.check_invariants()
        memory.pool.check_invariants()
        assert set(memory.pool.reservations) == {seq.seq_id for seq in scheduler.running}, "who runs and who has a range differ"
        for seq in scheduler.running:
            num_tokens = seq.num_computed_tokens + (scheduler.num_steps - self.naps.sleepers[seq][0] if seq in self.naps.sleepers else 0)
            assert num_tokens <= memory.pool.reservations[seq.seq_id].size, "a token lies outside of its range"


@given(st.integers(0, 2**32))
@settings(max_examples=150, deadline=None)
def test_sleeping_changes_nothing(seed):
    plain, jumped = random_run(seed, False), random_run(seed, True)
    assert run(plain) == run(jumped)
    for sim in (plain, jumped):
        pool = sim.memory.pool
        assert pool.space.num_free == pool.space.num_slots and not pool.reservations and sim.scheduler.cache.num_free == sim.scheduler.cache.num_blocks
    assert plain.memory.pool.num_moved == jumped.memory.pool.num_moved


@given(st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_exactly_those_who_run_have_a_range(seed):
    sim = random_run(seed, True)
    sim.__class__ = Checked
    report = run(sim)
    assert report.num_requests + report.num_rejected == sum(request.n for request in random_trace_of(seed))
    for usage in (report.mean, report.crowded, *(usage for _, usage in report.timeline)):
        if usage.num_slots:
            assert usage.num_slots == pytest.approx(report.num_slots) and min(usage) >= -1e-9 and usage.cached == 0


def random_trace_of(seed: int) -> list[Request]:
    """The trace of `random_run(seed, ...)`."""
    rng = random.Random(seed)
    rng.choice(list(AMOUNTS)), rng.choice(list(PLACEMENTS))
    return random_trace(rng)


def test_the_random_runs_are_hard():
    """Ranges move, sequences are sent back, are refused, and sleep: the tests above see all of them, often."""
    seen = Counter()
    for seed in range(120):
        sim = random_run(seed, True)
        while sim.is_busy or sim.arrivals.request is not None:
            num_steps = sim.scheduler.num_steps
            sim.advance()
            seen["steps slept through"] += sim.scheduler.num_steps - num_steps > 1
            seen["refused a range"] += sim.memory.policy.refused is not None
        seen["moved"] += sim.memory.pool.num_moved > 0
        seen["preempted"] += sim.ledger.report.num_preemptions > 0
        seen["too long"] += sim.ledger.report.num_rejected > 0
    assert min(seen[name] for name in ("steps slept through", "refused a range", "moved", "preempted", "too long")) >= 10, seen


def serve(amount: str, requests: list[Request], num_slots: int, placement: str = "buddy", **limits: object) -> Report:
    """A run in a memory of so many slots."""
    return simulate(requests, COST, memory=Reserve(amount, placement), num_blocks=num_slots, block_size=1, **limits)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("num_prompt,num_output", [(10, 6), (30, 34), (100, 28)])
def test_as_many_run_as_there_are_ranges(placement, num_prompt, num_output):
    """All alike and all at once: counted by hand."""
    requests, rounded = [Request(0.0, (Span(i, num_prompt),), num_output) for i in range(60)], placement == "buddy"
    final = num_prompt + num_output
    sizes = {"max": 200, "oracle": final, "pow2": num_prompt + next_power_of_two(num_output)}
    for amount, size in sizes.items():
        report = serve(amount, requests, 4096, placement, max_model_len=200)
        assert report.max_running == min(60, 4096 // (next_power_of_two(size) if rounded else size))
        assert (report.num_requests, report.num_preemptions, report.num_output_tokens) == (60, 0, 60 * num_output)
        assert report.crowded.rounded == pytest.approx((next_power_of_two(size) - size) * report.crowded.running if rounded else 0)


def test_where_nobody_waits_all_memories_are_the_same():
    requests = list(synthetic(40, 0.5, "alpaca", seed=3))
    reports = [serve(amount, requests, 15_728, max_model_len=2048) for amount in ("pow2", "oracle", "doubling")]
    blocks = simulate(requests, COST, enable_prefix_caching=False)
    for report in reports:
        assert (report.ttft, report.tpot, report.num_steps, report.max_running) == (blocks.ttft, blocks.tpot, blocks.num_steps, blocks.max_running)
        assert report.mean.used == pytest.approx(blocks.mean.used)


def test_blocks_beat_every_reservation():
    """With as many slots, they serve no less a second than the best of them, and lose far less memory."""
    requests = [request._replace(arrival_time=0.0) for request in synthetic(150, 1.0, "sharegpt", seed=5)]
    best = simulate(requests, COST, num_blocks=983, enable_prefix_caching=False, max_model_len=2048)
    for amount in AMOUNTS:
        for placement in PLACEMENTS:
            report = serve(amount, requests, 983 * 16, placement, max_model_len=2048)
            assert report.num_requests / report.seconds < best.num_requests / best.seconds
            assert report.mean.utilization < 0.75 < 0.97 < best.mean.utilization


def test_answers_are_requests_of_their_own():
    trace = [Request(0.0, (Span(1, 10),), 5, n=3), Request(1.0, (Span(2, 7),), 5)]
    assert [request.n for request in one_by_one(trace)] == [1, 1, 1, 1]
    report = serve("oracle", trace, 256)
    assert (report.num_requests, report.num_answers, report.num_prompt_tokens, report.max_running) == (4, 4, 37, 3)


def test_who_can_never_fit_is_refused():
    for amount, longest in (("oracle", 64), ("doubling", 64), ("pow2", 48)):  # of 100 slots, a buddy system has 64 in one piece
        trace = [Request(0.0, (Span(1, longest - 16),), 16), Request(0.0, (Span(2, 65),), 16)]
        report = serve(amount, trace, 100)
        assert (report.num_requests, report.num_rejected) == (1, 1)
    assert serve("oracle", [Request(0.0, (Span(1, 84),), 16)], 100, "first-fit").num_requests == 1
    assert serve("max", [Request(0.0, (Span(1, 10),), 16)], 100, max_model_len=200).num_rejected == 1


def test_bad_arguments_are_refused():
    for names in (("most", "buddy"), ("max", "worst-fit")):
        with pytest.raises(ValueError, match="choose one of"):
            Reserve(*names)
    with pytest.raises(ValueError, match="say max_model_len"):
        serve("max", [], 100)
    with pytest.raises(ValueError, match="not everybody who decodes"):
        serve("oracle", [], 100, max_num_batched_tokens=16)
