"""The simulator: it decides as the engine does, sleeping changes nothing, and the books add up."""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys
from array import array
from collections import Counter
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagedlit.memory.allocator import BlockAllocator, Event
from pagedlit.memory.block_table import BlockTable
from pagedlit.memory.prefix_cache import PrefixCache
from pagedlit.serving import simulator as module
from pagedlit.serving.cost_model import DEVICES, MODELS, CostModel, CostModelRunner, CountedBatch, Load, get_cost_model, load_of
from pagedlit.serving.engine import build_engine
from pagedlit.serving.policy import LongestPrefixMatch, get_policy
from pagedlit.serving.scheduler import ForwardBatch, RunnerOutput, Scheduler
from pagedlit.serving.sequence import SamplingParams, Sequence, SequenceStatus
from pagedlit.serving.simulator import Arrivals, Average, Paged, Report, Simulation, Timeline, Usage, compare, percentile, run, simulate
from pagedlit.serving.workload import PROFILES, Lengths, Profile, Request, Span, Talk, conversations, load_azure, load_mooncake, load_trace
from pagedlit.serving.workload import poisson, resample, synthetic

COST = CostModel(DEVICES["A100-40G"], MODELS["OPT-13B"])
TRACES = Path(os.environ.get("PAGEDLIT_TRACES", Path(__file__).parents[2] / "shared/traces"))
needs_traces = pytest.mark.skipif(not (TRACES / "azure_conv.csv").exists(), reason="the public traces are not here")


def random_trace(rng: random.Random, num_requests: int = 30) -> list[Request]:
    """Short prompts with shared beginnings, several answers, repeated prompts, bursts and pauses, and some that can never fit."""
    now, trace = 0.0, []
    for index in range(num_requests):
        now += rng.choice([0, 0, 0, 0.01, 0.05, 0.3, 2.0])
        shared = rng.choice([(), (Span(1, 5),), (Span(1, 8), Span(2, rng.randint(1, 9))), (Span(3, rng.randint(1, 20)),)])
        own = rng.choice([(), (Span(100 + index, rng.randint(1, 25)),)]) if shared else (Span(100 + index, rng.randint(1, 25)),)
        answer_id = rng.choice([None, None, None, 2, 50])
        prompt = shared + own if rng.random() < 0.97 else (Span(1, 4000),)
        trace.append(Request(now, prompt, rng.choice([1, 2, 3, 10, 40]), rng.choice([1, 1, 1, 2, 3]), answer_id))
    return trace


def random_settings(rng: random.Random) -> dict[str, object]:
    """Tiny pools, so that preemption is the rule."""
    block_size = rng.choice([1, 2, 3, 4, 16])
    num_seqs = rng.choice([1, 2, 5, 20])
    return {
        "num_blocks": rng.randint(72 // block_size, 150 // block_size), "block_size": block_size, "max_num_seqs": num_seqs,
        "max_num_batched_tokens": num_seqs + rng.choice([0, 1, 7, 64]), "max_prefill_chunk": rng.choice([None, 1, 5, 512]),
        "enable_prefix_caching": rng.random() < 0.7, "eviction_policy": rng.choice(["lru", "fifo", "lfu", "reuse-bonus"]),
        "policy": rng.choice(["priority", "fcfs", "lpm", "impatient"]), "max_model_len": rng.choice([None, None, 30]),
    }  # fmt: skip


def settled(settings: dict[str, object]) -> dict[str, object]:
    """The same with a policy object where no name will do."""
    return settings | ({"policy": LongestPrefixMatch(patience=3, window=2)} if settings["policy"] == "impatient" else {})


def simulation(trace: list[Request], jump: bool, block_size: int, num_blocks: int, eviction_policy: str, policy: object,
               enable_prefix_caching: bool, **limits: object) -> Simulation:  # fmt: skip
    """What `simulate` builds, before it runs."""
    eviction = module.get_eviction_policy(eviction_policy)
    cache, runner = PrefixCache(BlockAllocator(num_blocks), block_size, eviction, enable_prefix_caching), CostModelRunner(COST)
    scheduler = module.make_scheduler(cache, runner, get_policy(policy) if isinstance(policy, str) else policy, limits)
    return Simulation(Arrivals(trace), scheduler, runner, Paged(scheduler), jump)


def record(sim: Simulation) -> list[Event]:
    """All events from now on but those that a sleeper does not cause."""
    log: list[Event] = []
    sim.scheduler.events.subscribe(lambda event: log.append(event) if event.kind != "scheduled" else None)
    return log


class Checked(Simulation):
    """A simulation that checks itself between steps."""

    def advance(self) -> None:
        super().advance()
        self.scheduler.check_invariants()
        assert self.scheduler.max_num_batched_tokens + len(self.naps.sleepers) == self.budget
        assert {seq for seq in self.scheduler.running if seq.held} == set(self.naps.sleepers)


def check_whole(sim: Simulation) -> None:
    """Nobody is left, and the pool is whole."""
    cache = sim.scheduler.cache
    assert not sim.naps.sleepers and not sim.scheduler.running and not sim.scheduler.waiting and not sim.ledger.tickets
    assert cache.num_free == cache.num_blocks and sim.naps.load() == (0, 0, 0) and sim.naps.num_slots == 0


# sleeping changes nothing


@given(st.integers(0, 2**32))
@settings(max_examples=150, deadline=None)
def test_sleeping_changes_nothing(seed):
    rng = random.Random(seed)
    trace, options = random_trace(rng), settled(random_settings(rng))
    results = []
    for jump in (False, True):
        sim = simulation(trace, jump, **options)
        log = record(sim)
        results.append((run(sim), log))
        check_whole(sim)
    (plain, plain_log), (jumped, jumped_log) = results
    assert plain == jumped, "the reports differ"
    assert plain_log == jumped_log, "the same reports, but not the same events"


@given(st.integers(0, 2**32))
@settings(max_examples=25, deadline=None)
def test_invariants_hold_while_they_sleep(seed):
    rng = random.Random(seed)
    sim = simulation(random_trace(rng), True, **settled(random_settings(rng)))
    sim.__class__, sim.budget = Checked, sim.scheduler.max_num_batched_tokens
    report = run(sim)
    check_whole(sim)
    assert report.num_requests + report.num_rejected == 30


def test_the_random_traces_are_hard():
    """Preemptions, hits, copies, refusals, crowds and naps: the tests above see all of them, often."""
    seen = Counter()
    for seed in range(60):
        rng = random.Random(seed)
        sim = simulation(random_trace(rng), True, **settled(random_settings(rng)))
        sim.__class__, sim.budget, log = Checked, sim.scheduler.max_num_batched_tokens, record(sim)
        while sim.is_busy or sim.arrivals.request is not None:
            num_steps, crowd = sim.scheduler.num_steps, bool(sim.scheduler.waiting)
            sim.advance()
            seen["naps"] += bool(sim.naps.sleepers)
            seen["steps slept through"] += sim.scheduler.num_steps - num_steps > 1
            seen["steps slept through in a crowd"] += crowd and sim.scheduler.num_steps - num_steps > 1
        seen.update({event.kind for event in log})
        seen["refused"] += sim.ledger.report.num_rejected > 0
    names = ("preempted", "hit", "copied", "evicted", "refused", "naps", "steps slept through", "steps slept through in a crowd")
    assert min(seen[name] for name in names) >= 15, seen


@given(st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_it_decides_as_the_engine_does(seed):
    """The engine of chapter 07, with full batches: the same answers at the same times, to the last bit."""
    rng = random.Random(seed)
    trace = random_trace(rng)
    options = settled(random_settings(rng))
    sim = simulation(trace, True, **options)
    ended: list[tuple[float, int, int, int]] = []
    note = sim.ledger.note

    def spy(seq: Sequence, now: float) -> None:
        note(seq, now)
        if seq.status is SequenceStatus.FINISHED:
            ended.append((now, seq.seq_id, seq.num_preemptions, len(seq.token_ids)))

    sim.ledger.note = spy
    run(sim)
    assert ended == drive(trace, **options)


def drive(trace: list[Request], num_blocks: int, block_size: int, **limits: object) -> list[tuple[float, int, int, int]]:
    """The engine under a trace."""
    runner, ended, index, num_sequences = CostModelRunner(COST), [], 0, 0
    if isinstance(limits["policy"], str):
        limits["policy"] = get_policy(limits["policy"])
    engine = build_engine(runner, num_blocks, block_size, clock=runner.clock, **limits)
    while index < len(trace) or engine.sequences:
        if not engine.sequences:
            runner.now = max(runner.now, trace[index].arrival_time)
        while index < len(trace) and trace[index].arrival_time <= runner.now:
            request, index = trace[index], index + 1
            try:
                seq = module.sequence_of(request, num_sequences)  # `add_request` gives other seeds, and among equals the tokens decide
                num_sequences += request.n
                engine.scheduler.add(seq)
                engine.sequences[seq.seq_id] = seq
            except module.RequestTooLong:
                pass
        if engine.sequences:
            moved = engine.step()
            ended += [(runner.now, s.seq_id, s.num_preemptions, len(s.token_ids)) for s in moved if s.status is SequenceStatus.FINISHED]
    return ended


def test_sleeping_pays():
    """Most sequence-steps are slept through."""
    planned = 0

    class Counting(Scheduler):
        def update(self, output: RunnerOutput) -> list[Sequence]:
            nonlocal planned
            planned += len(output.token_ids)
            return super().update(output)

    sim = simulation(list(synthetic(200, 2.0)), True, 16, 980, "lru", "fcfs", True)
    sim.scheduler.__class__ = Counting
    report = run(sim)
    assert planned < 0.3 * report.num_output_tokens


# the report


def test_books_of_a_request_that_is_alone():
    report = simulate([Request(1.0, (Span(1, 100),), 21)], COST, num_blocks=20)
    step = [COST.seconds(Load(100, 100, 5050))] + [COST.seconds(Load(1, 100 + i, 100 + i)) for i in range(1, 21)]
    assert (report.num_requests, report.num_answers, report.num_steps) == (1, 1, 21)
    assert (report.num_prompt_tokens, report.num_output_tokens, report.num_computed_tokens, report.num_hit_tokens) == (100, 21, 120, 0)
    assert list(report.queue) == [0] and list(report.ttft) == pytest.approx([step[0]])
    assert list(report.tpot) == pytest.approx([fmean(step[1:])]) and report.seconds == pytest.approx(1 + sum(step))
    assert report.max_running == 1 and report.crowded_seconds == 0 and report.num_preemptions == 0
    used = sum(seconds * (100 + i) for i, seconds in enumerate(step))
    assert report.mean.used == pytest.approx(used / report.seconds)


def test_hits_are_where_the_spans_say():
    shared = (Span(1, 64),)
    trace = [Request(i * 100.0, (*shared, Span(10 + i, 36)), 5) for i in range(4)]
    assert simulate(trace, num_blocks=100).num_hit_tokens == 3 * 64
    assert simulate(trace, num_blocks=100, enable_prefix_caching=False).num_hit_tokens == 0
    follow_up = [Request(0.0, (Span(1, 50),), 30, answer_id=2), Request(100.0, (Span(1, 50), Span(2, 30), Span(3, 9)), 5)]
    assert simulate(follow_up, num_blocks=100).num_hit_tokens == 79  # the answer's last token was never computed
    assert simulate([follow_up[0]._replace(answer_id=None), follow_up[1]], num_blocks=100).num_hit_tokens == 50


def test_answers_to_one_prompt_share_it():
    alone = simulate([Request(0.0, (Span(1, 160),), 10)], num_blocks=100)
    four = simulate([Request(0.0, (Span(1, 160),), 10, n=4)], num_blocks=100)
    assert (four.num_requests, four.num_answers, four.num_prompt_tokens, four.num_output_tokens) == (1, 4, 160, 40)
    assert alone.num_steps == four.num_steps and four.max_running == 4
    last = four.timeline[-1][1]
    assert last.used == pytest.approx(160 + 4 * 9) and last.internal == pytest.approx(4 * 7)


def test_kinds_of_slots_add_up():
    report = simulate(synthetic(150, 3.0), num_blocks=400)
    for usage in (report.mean, report.crowded, *(usage for _, usage in report.timeline)):
        assert usage.num_slots == pytest.approx(6400) and min(usage) >= 0
    assert abs(report.mean.waste.total - 6400) <= 3
    times = [until for until, _ in report.timeline]
    assert times == sorted(times) and times[-1] == pytest.approx(report.seconds) and len(times) <= 512


def test_refused_requests_are_counted():
    report = simulate([Request(0.0, (Span(1, 5000),), 3), Request(1.0, (Span(2, 10),), 3)], num_blocks=100)
    assert (report.num_requests, report.num_rejected) == (1, 1)
    empty = simulate([], num_blocks=10)
    assert empty.num_steps == 0 and empty.seconds == 0 and "0 / 0" in empty.table()


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="out of order"):
        simulate([Request(1.0, (Span(1, 5),), 3), Request(0.5, (Span(2, 5),), 3)], num_blocks=10)
    with pytest.raises(ValueError, match="not everybody who decodes"):
        simulate([], num_blocks=10, max_num_batched_tokens=16)
    with pytest.raises(ValueError, match="must be one of"):
        simulate([], num_blocks=10, policy="fair")
    with pytest.raises(ValueError, match="choose one of"):
        simulate([], num_blocks=10, eviction_policy="mru")


def test_a_run_depends_on_nothing_but_its_arguments():
    code = (
        "from pagedlit.serving.simulator import simulate; from pagedlit.serving.workload import conversations\n"
        "print(simulate(conversations(40, 0.5, seed=3), num_blocks=700))"
    )
    outputs = set()
    for hash_seed in ("0", "1"):
        env = os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(Path(__file__).parent.parent)}
        outputs.add(subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout)
    assert len(outputs) == 1 and "num_requests=" in outputs.pop()


def test_progress_is_told():
    told: list[tuple[int, float]] = []
    report = simulate(synthetic(350, 5.0, "alpaca"), num_blocks=980, progress=lambda *each: told.append(each))
    assert told == sorted(told) and told[-1] == (350, report.seconds) and len(told) >= 4


@pytest.mark.parametrize("with_tqdm", [True, False])
def test_a_progress_bar(with_tqdm, capsys, monkeypatch):
    if not with_tqdm:
        monkeypatch.setattr(module, "find_spec", lambda name: None)
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    load = list(synthetic(150, 5.0, "alpaca"))
    assert simulate(load, progress=True) == simulate(load)
    printed = capsys.readouterr()
    assert printed.out == "" and ("150/150" if with_tqdm else "150 requests done") in printed.err


def test_memory_does_not_grow_with_the_trace():
    """A trace is read one request ahead."""
    num_read = 0

    def counted():
        nonlocal num_read
        for request in synthetic(300, 1.0, "alpaca"):
            num_read += 1
            yield request

    ahead: list[int] = []
    simulate(counted(), num_blocks=2000, progress=lambda done, now: ahead.append(num_read - done))
    assert ahead and max(ahead) < 50


def test_tables_have_a_column_for_each_report():
    report = simulate(synthetic(20, 1.0), num_blocks=980)
    lines = compare({"a": report, "b": report}).splitlines()
    assert lines[0] == "| | a | b |" and all(line.count("|") == 4 for line in lines)
    assert report.table().count("\n") == len(report.rows()) + 1


def test_averages():
    average, timeline = Average(), Timeline(num_points=3)
    for step in range(1000):
        usage = Usage(step % 7, 1, 2, 3, 4, 5, 6, step)
        average.add(0.5 + step % 3, usage)
        timeline.add(0.5 + step % 3, usage)
    total = Average()
    for point in timeline.points:
        total.merge(point)
    assert total.mean() == pytest.approx(average.mean()) and total.seconds == pytest.approx(average.seconds)
    assert 3 <= len(timeline.points) <= 6
    assert [percentile([3, 1, 2], share) for share in (0, 0.3, 0.5, 0.9, 1)] == [1, 1, 2, 3, 3] and percentile([], 0.5) == 0


# the cost model


def test_counted_batches_count_what_full_ones_lay_out():
    rng = random.Random(1)
    for _ in range(200):
        full, counted = ForwardBatch(4), CountedBatch(4)
        cache = PrefixCache(BlockAllocator(64), 4)
        for seq_id in range(rng.randint(1, 5)):
            tokens = array("i", range(rng.randint(1, 30)))
            seq = Sequence(seq_id, tokens, len(tokens), SamplingParams(), seed=seq_id + 5)
            seq.table = BlockTable(cache, 4)
            seq.table.grow(len(tokens))
            seq.num_computed_tokens = rng.randrange(len(tokens))
            num_tokens = rng.randint(1, len(tokens) - seq.num_computed_tokens)
            full.add(seq, num_tokens, [])
            counted.add(seq, num_tokens, [])
        assert load_of(full) == load_of(counted) and full.seeds == counted.seeds
        assert CostModelRunner(COST).run(full) == CostModelRunner(COST).run(counted)


def test_the_roofline():
    one, many = Load(1, 1000, 1000), Load(512, 512, 512 * 513 // 2)
    assert COST.seconds(one) == COST.memory_seconds(one) + COST.overhead and COST.seconds(many) == COST.compute_seconds(many) + COST.overhead
    assert COST.memory_seconds(one) == pytest.approx((2 * 12_853_473_280 + 1001 * 819_200) / (1.555e12 * 0.8))
    assert COST.compute_seconds(many) == pytest.approx((2 * 12_853_473_280 * 512 + 4 * 40 * 40 * 128 * many.num_pairs) / (312e12 * 0.6))
    assert replace(COST, num_gpus=2).memory_seconds(one) == pytest.approx(COST.memory_seconds(one) / 2)
    assert MODELS["Llama-3-70B"].kv_bytes_per_token == 8 * (40 << 10) and MODELS["Llama-2-7B"].kv_bytes_per_token == 512 << 10
    assert abs(COST.num_blocks(16) * 16 - 15_728) < 100  # the slots of the vLLM paper


@pytest.mark.parametrize("names", [("B100", "OPT-13B"), ("H100", "GPT-2")])
def test_unknown_names_are_refused_with_those_that_there_are(names):
    with pytest.raises(ValueError, match="choose one of .*(H100|OPT-13B)"):
        get_cost_model(*names)
    with pytest.raises(ValueError, match="leaves no room"):
        get_cost_model("L4", "Llama-3-70B").num_blocks(16)


# workloads


def test_generators_are_deterministic_and_in_order():
    for make in (lambda seed: synthetic(300, 2.0, seed=seed), lambda seed: conversations(80, 1.0, seed=seed)):
        first, again, other = list(make(1)), list(make(1)), list(make(2))
        assert first == again != other
        assert all(a.arrival_time <= b.arrival_time for a, b in zip(first, first[1:]))
        assert all(span.num_tokens > 0 and 0 <= span.token_id < 2**30 for request in first for span in request.prompt)


def test_lengths_have_the_mean_they_say():
    rng = random.Random(1)
    for sigma in (0.3, 1.0):
        drawn = [Lengths(200, sigma, 10**6).draw(rng) for _ in range(20_000)]
        assert abs(fmean(drawn) / 200 - 1) < 0.03 and abs(math.log(median(drawn)) - (math.log(200) - sigma**2 / 2)) < 0.03
    assert max(Lengths(200, 1.0, 300).draw(rng) for _ in range(1000)) == 300
    with pytest.raises(ValueError, match="unknown profile 'llama'; choose one of azure, sharegpt, alpaca"):
        next(synthetic(1, 1.0, "llama"))


def test_conversations_repeat_what_was_said():
    talk = Talk(Profile(Lengths(20, 0.5, 100), Lengths(30, 0.5, 100)), num_turns=3.0)
    requests = list(conversations(200, 1.0, talk, num_shared_tokens=7))
    by_answer = {request.answer_id: request for request in requests}
    assert len(by_answer) == len(requests) and 2.5 < len(requests) / 200 < 3.5
    for request in requests:
        assert request.prompt[0] == Span(0, 7)
        if len(request.prompt) > 2:
            before = by_answer[request.prompt[-2].token_id]
            assert request.prompt[:-2] == before.prompt and request.prompt[-2].num_tokens == before.num_output_tokens
            assert request.arrival_time > before.arrival_time


def test_traces_are_read(tmp_path):
    azure, mooncake = tmp_path / "a.csv", tmp_path / "b.jsonl"
    azure.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,0\n")
    mooncake.write_text('{"timestamp": 1500, "input_length": 600, "output_length": 5, "hash_ids": [4, 9]}\n')
    first, second = load_trace(azure)
    assert (first.arrival_time, first.num_prompt_tokens, second.num_output_tokens) == (0.0, 374, 1)
    assert second.arrival_time == pytest.approx(4.314579)
    assert list(load_trace(mooncake)) == [Request(1.5, (Span(4, 512), Span(9, 88)), 5)]
    assert simulate(azure) == simulate(str(azure)) == simulate([first, second])
    mooncake.write_text('{"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [4]}\n')
    with pytest.raises(ValueError):
        list(load_trace(mooncake))
    with pytest.raises(ValueError, match=".csv or .jsonl"):
        load_trace(tmp_path / "c.txt")
    drawn = list(resample([first, second], 50, 2.0, seed=3))
    assert {request.num_prompt_tokens for request in drawn} == {374, 396} and len({request.prompt[0].token_id for request in drawn}) == 50
    assert [request.num_prompt_tokens for request in poisson(drawn, 1.0)] == [request.num_prompt_tokens for request in drawn]


@needs_traces
def test_the_public_traces():
    azure, mooncake = list(load_azure(TRACES / "azure_conv.csv")), list(load_mooncake(TRACES / "conversation_trace.jsonl"))
    assert (len(azure), sum(r.num_output_tokens for r in azure)) == (19_366, 4_088_665)
    assert (len(mooncake), sum(r.num_prompt_tokens for r in mooncake)) == (12_031, 144_793_823)
    profile = PROFILES["azure"]
    assert profile.prompt.mean == pytest.approx(fmean(r.num_prompt_tokens for r in azure), abs=0.1)
    assert profile.answer.mean == pytest.approx(fmean(r.num_output_tokens for r in azure), abs=0.1)


@needs_traces
def test_ten_minutes_of_azure():
    trace = [request for request in load_azure(TRACES / "azure_conv.csv") if request.arrival_time < 600]
    cost = get_cost_model("H100", "Llama-3.1-8B")
    report = simulate(trace, cost)
    assert report.num_requests == len(trace) and report.num_preemptions == 0 and report.mean.utilization > 0.98


@needs_traces
def test_hits_of_mooncake_are_those_of_its_hash_ids():
    """With room for all, a prompt hits what came before, up to its last token."""
    trace, seen, expected = [], set(), 0
    for index, request in enumerate(load_mooncake(TRACES / "conversation_trace.jsonl")):
        if index == 120:
            break
        trace.append(request._replace(arrival_time=100.0 * index, num_output_tokens=2))
        known = sum(span.num_tokens for span in request.prompt if span.token_id in seen)
        expected += min(known, request.num_prompt_tokens - 1)
        seen.update(span.token_id for span in request.prompt)
    report = simulate(trace, get_cost_model("H100", "Llama-3.1-8B"), num_blocks=200_000, block_size=16)
    assert report.num_hit_tokens == expected > 0


def test_a_report_is_data():
    first, second = (simulate(synthetic(30, 2.0), num_blocks=980) for _ in range(2))
    assert first == second and isinstance(first, Report)
    first.ttft[0] = math.nextafter(first.ttft[0], 1)
    assert first != second


AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.0,3,4\n"


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("a.csv", "time,prompt,answer\n2023-11-16 18:15:46.0,3,4\n", "request 1: there is no 'TIMESTAMP'"),
        ("b.csv", AZURE + "yesterday,3,4\n", "request 2: Invalid isoformat"),
        ("c.csv", AZURE + "2023-11-16 18:15:47.0,7\n", "request 2: int"),
        ("d.csv", AZURE + "2023-11-16 18:15:47.0,0,4\n", "request 2: a prompt has 0 times"),
        ("e.jsonl", "[1, 2]\n", "request 1: list indices"),
        ("f.jsonl", '{"timestamp": 0, "input_length": 10\n', "request 1: Expecting"),
        ("g.jsonl", '{"timestamp": 0, "input_length": 1300, "output_length": 5, "hash_ids": [0, 1]}\n', "request 1: 2 hash_ids for 1300 tokens"),
        ("h.jsonl", '\n{"timestamp": 0, "input_length": 10, "output_length": 5, "hash_ids": [5000000000]}\n', "of an id from 0 to"),
        ("i.jsonl", '{"timestamp": NaN, "input_length": 10, "output_length": 5, "hash_ids": [1]}\n', "not a time"),
    ],
)
def test_a_broken_trace_is_refused_with_the_place(tmp_path, name, text, why):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError) as caught:
        simulate(tmp_path / name)
    assert why in str(caught.value) and name in str(caught.value)


@pytest.mark.parametrize("bad", [Request(math.nan, (Span(1, 3),), 4), Request(0.0, (), 4), Request(0.0, (Span(1, -3),), 4), Request(math.inf, (Span(1, 3),), 4)])
def test_requests_that_are_none_are_refused(bad):
    with pytest.raises(ValueError):
        simulate([Request(0.0, (Span(0, 3),), 4), bad])
