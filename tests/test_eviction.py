"""Each eviction policy against a plain model of its definition, in real caches and engines, and the bars on real and made-up traces."""

import json
import os
import random
from array import array
from itertools import count
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize
from test_prefix_cache import Plane, PrefixCacheMachine
from toy_world import Oracle, check_whole, drain, random_engine, random_move

from pagedlit.memory import eviction
from pagedlit.memory.allocator import BlockAllocator
from pagedlit.memory.eviction import (
    FIFO, LFU, POLICIES, Belady, Levels, ReuseBonus, RunningMedian, SecondChance, Watch, get_eviction_policy, num_blocks_of, replay, replay_one
)
from pagedlit.memory.prefix_cache import LRU, PrefixCache

PROMPTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=7).map(lambda tokens: array("i", tokens)), max_size=60)
each_policy = pytest.mark.parametrize("name", POLICIES)


class Checked:
    """A policy beside the plainest book-keeping: who is idle, who was when, how often."""

    def __init__(self, policy):
        self.policy, self.idle, self.first, self.last, self.uses, self.clock = policy, set(), {}, {}, {}, count(1)

    def __len__(self):
        assert len(self.policy) == len(self.idle)
        return len(self.idle)

    def add(self, node):
        assert node not in self.idle
        now = next(self.clock)
        self.first.setdefault(node, now)
        self.last[node], self.uses[node] = now, self.uses.get(node, 0) + 1
        self.idle.add(node)
        self.policy.add(node)

    def remove(self, node):
        self.idle.remove(node)
        self.policy.remove(node)

    def forget(self, node):
        self.idle.discard(node)
        self.policy.forget(node)

    def victim(self):
        node = self.policy.victim()
        assert node in self.idle and not node.children and self.policy.victim() is node
        self.check(node, [each for each in self.idle if not each.children])
        return node

    def check(self, node, leaves):
        if type(self.policy) is LRU:
            assert self.last[node] == min(self.last[each] for each in self.idle)
        if type(self.policy) is FIFO:
            assert self.first[node] == min(self.first[each] for each in leaves)
        if type(self.policy) is LFU:
            assert self.uses[node] == min(self.uses[each] for each in leaves)
        if type(self.policy) is ReuseBonus:
            check_reuse_bonus(self, node)


def check_reuse_bonus(checked, node):
    """The victim is oldest if each level counts as a bonus younger, among all idle blocks, not among leaves alone."""
    policy = checked.policy
    ages = {each: each.state.last_used + each.state.level * policy.bonus for each in checked.idle}
    assert ages[node] == min(ages.values())
    queued = [each for queue in policy.levels.queues for each in queue]
    assert len(queued) == len(set(queued)) and set(queued) == checked.idle
    assert len(policy.ghosts) <= policy.ghosts.PER_BLOCK * (policy.ghosts.num_blocks + 1)
    for each in checked.idle:
        assert checked.last[each] == each.state.last_used and each.state.level <= Levels.TOP
        assert each.parent not in checked.idle or each.parent.state.level >= each.state.level
    for miniature in policy.watch.miniatures:
        assert sorted(miniature.level_of) == sorted(key for queue in miniature.levels.queues for key in queue)


class EvictionMachine(PrefixCacheMachine):
    """The prefix cache's own random life, under each policy."""

    @initialize(block_size=st.integers(1, 8), num_blocks=st.integers(2, 12), name=st.sampled_from(sorted(POLICIES)))
    def start(self, block_size, num_blocks, name):
        self.plane = Plane(num_blocks, block_size, Checked(get_eviction_policy(name)))
        self.cache, self.runs = self.plane.cache, []


TestEvictionMachine = EvictionMachine.TestCase
TestEvictionMachine.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


@each_policy
@given(prompts=PROMPTS, num_blocks=st.integers(4, 12))
@settings(max_examples=60, deadline=None)
def test_against_the_definition(name, prompts, num_blocks):
    cache = PrefixCache(BlockAllocator(num_blocks), 1, Checked(get_eviction_policy(name)))
    for prompt in prompts:
        replay_one(cache, prompt)
        cache.check_invariants()
    cache.clear()
    assert len(cache.policy) == 0


@given(PROMPTS)
@settings(max_examples=60, deadline=None)
def test_second_chance_spares_what_was_used(prompts):
    """Whoever has been used since the hand passed is not the victim, unless everybody has been."""
    policy = SecondChance()
    cache = PrefixCache(BlockAllocator(7), 1, policy)
    for prompt in prompts:
        replay_one(cache, prompt)
        if len(policy):
            assert not policy.victim().state[1]


@given(st.lists(st.integers(0, 50), min_size=1, max_size=40), st.integers(1, 9))
def test_running_median(values, num_values):
    median = RunningMedian(num_values)
    for value in values:
        median.add(value)
    recent = sorted(values[-num_values:])
    assert median.value == recent[len(recent) // 2]


def test_levels_of_a_returning_block():
    """New is 1, a partly filled block 0; each return adds one, at most to 5, across evictions too, until the ghost has gone."""
    policy = ReuseBonus()
    cache = PrefixCache(BlockAllocator(4), 2, policy)
    prompt, other, levels = array("i", [1, 1, 2]), array("i", [8, 8]), []
    replay_one(cache, other)  # now it knows how many tokens a full block has
    for _ in range(7):
        replay_one(cache, prompt)
        levels.append(sorted(node.state.level for node in cache.nodes.values() if node.key != other.tobytes()))
    assert levels == [[0, 1], [2, 2], [3, 3], [4, 4], [5, 5], [5, 5], [5, 5]]
    cache.release(cache.allocate(4))
    assert not cache.nodes and len(policy.ghosts) > 0
    replay_one(cache, prompt)
    assert sorted(node.state.level for node in cache.nodes.values())[-1] == 5


@each_policy
def test_memory_is_bounded(name):
    """A million different blocks leave nothing behind but what the pool's size explains."""
    rng, policy = random.Random(1), get_eviction_policy(name)
    replay((array("i", [rng.randrange(10**6) for _ in range(20)]) for _ in range(3000)), 64, policy)
    if isinstance(policy, ReuseBonus):
        assert len(policy.ghosts) <= policy.ghosts.PER_BLOCK * 65 and policy.ghosts.num_blocks <= 64
        assert all(len(miniature.level_of) <= 64 for miniature in policy.watch.miniatures)
    elif not isinstance(policy, LRU):
        assert len(policy._heap) <= 2 * 64 + 17


@pytest.mark.parametrize("name", ["fifo", "lfu", "second-chance"])
def test_heap_operations_are_amortised(name, monkeypatch):
    """A constant number of heap operations for each call, however large the pool."""
    calls = count()

    def counted(function):
        return lambda *arguments: (next(calls), function(*arguments))[1]

    for function in (eviction.heappush, eviction.heappop):
        monkeypatch.setattr(eviction, function.__name__, counted(function))
    for num_blocks in (50, 500):
        prompts, start = sessions(300, seed=num_blocks), next(calls)
        replay(prompts, num_blocks, get_eviction_policy(name))
        assert next(calls) - start < 3 * num_blocks_of(prompts)


def test_the_bonus_looks_at_six_heads_only(monkeypatch):
    """One look for each victim, and at most one for each miniature and watched block."""
    looks, oldest = count(), Levels.oldest
    monkeypatch.setattr(Levels, "oldest", lambda self, bonus: (next(looks), oldest(self, bonus))[1])
    for num_blocks in (100, 1000):
        prompts, start = sessions(400, seed=3), next(looks)
        replay(prompts, num_blocks, ReuseBonus())
        assert next(looks) - start < num_blocks_of(prompts) * (1 + 2 * len(Watch.WEIGHTS) / Watch.ONE_IN)


def test_names():
    assert [type(get_eviction_policy(name)) for name in POLICIES] == [LRU, FIFO, LFU, SecondChance, ReuseBonus]
    assert get_eviction_policy("lru") is not get_eviction_policy("lru")
    with pytest.raises(ValueError, match="unknown eviction policy 'mru'; choose one of lru, "):
        get_eviction_policy("mru")


@each_policy
@pytest.mark.parametrize("seed", range(6))
def test_no_policy_changes_a_text(name, seed):
    """Tiny pools, forks, aborts, preemption, failures: what is said does not depend on what was evicted."""
    rng = random.Random(seed)
    engine = random_engine(rng)
    engine.scheduler.cache.policy = Checked(get_eviction_policy(name))
    oracle = Oracle(engine)
    for _ in range(60):
        random_move(rng, engine, oracle)
        engine.check_invariants()
    drain(engine, oracle)
    check_whole(engine)


# Workloads


def prompt_of(chain, is_tail_partial=False):
    token_ids = array("i", [block for block in chain for _ in range(2)])
    return token_ids[:-1] if is_tail_partial else token_ids


def sessions(num_sessions, turns=(1, 6), pause=60, first=(2, 20), growth=(1, 4), every=1, seed=1):
    """Sessions that open at random, take turns and pause between them."""
    rng, fresh, arrivals, now = random.Random(seed), count(10), [], 0.0
    for _ in range(num_sessions):
        now += rng.expovariate(1 / every)
        when, chain = now, [0, 1, 2]
        for turn in range(rng.randint(*turns)):
            chain = chain[: len(chain) - (turn > 0)] + [next(fresh) for _ in range(rng.randint(*(growth if turn else first)))]
            arrivals.append((when, len(arrivals), prompt_of(chain)))
            when += rng.lognormvariate(0, 0.7) * pause
    return [prompt for _, _, prompt in sorted(arrivals, key=lambda each: each[:2])]


def documents(num_prompts, popularity, seed=2, num_documents=400, archive=0):
    """Favourites (Pareto), or all alike (popularity 0); with an archive that is read once in a while."""
    rng, fresh = random.Random(seed), count()
    known = [[next(fresh) for _ in range(rng.randint(4, 30))] for _ in range(num_documents)]
    for n in range(num_prompts):
        index = int(rng.paretovariate(popularity)) if popularity else rng.randrange(num_documents)
        yield prompt_of([*known[min(num_documents - 1, index)], next(fresh)])
        if archive and n % 200 == 0:
            yield from [prompt_of([next(fresh) for _ in range(60)]) for _ in range(archive)]


def twice(distance, num_documents=1200):
    rng, fresh, known = random.Random(7), count(), []
    for n in range(num_documents):
        known.append([next(fresh) for _ in range(rng.randint(5, 25))])
        yield prompt_of(known[n])
        if n >= distance:
            yield prompt_of([*known[n - distance], next(fresh)])


def bursts(num_prompts=300):
    """Each prompt is sampled eight times in a row and never again, beside chats."""
    fresh, rng = count(10**7), random.Random(5)
    chats = iter(sessions(600, seed=9))
    for _ in range(num_prompts):
        chain = [next(fresh) for _ in range(rng.randint(5, 30))]
        for _ in range(8):
            yield prompt_of([*chain, next(fresh)])
            yield from [prompt for prompt in [next(chats, None)] if prompt]


WORKLOADS = {
    "chat": lambda: sessions(900),
    "agents": lambda: sessions(60, (5, 60), 5, (5, 20), (1, 5), 20),
    "agents in a hurry": lambda: sessions(60, (5, 60), 2, (5, 60), (1, 3), 5),
    "favourites": lambda: documents(1800, 0.6),
    "all alike": lambda: documents(1800, 0),
    "archive": lambda: documents(1500, 0.6, archive=30),
    "twice": lambda: twice(80),
    "bursts": bursts,
    "loop": lambda: [prompt_of(range(20 * n, 20 * n + 20)) for _ in range(12) for n in range(80)],
    "phases": lambda: [*sessions(400), *[array("i", [t + 10**6 for t in p]) for p in twice(80, 500)], *sessions(30, (5, 40), 5, seed=4)],
}


@pytest.mark.parametrize("kind", WORKLOADS)
def test_never_a_point_below_lru(kind):
    prompts = list(WORKLOADS[kind]())
    for num_blocks in (500, 1000, 2800):
        found = {policy: replay(prompts, num_blocks, policy()) for policy in (LRU, ReuseBonus)}
        for half in (slice(0, len(prompts) // 2), slice(len(prompts) // 2, None)):
            lru, reuse = (100 * sum(hits[half]) / num_blocks_of(prompts[half]) for hits in found.values())
            assert reuse > lru - 1, (num_blocks, lru, reuse)


def test_it_gains_where_there_is_something_to_gain():
    gains = {}
    for kind, num_blocks in (("favourites", 500), ("archive", 1000)):
        prompts = list(WORKLOADS[kind]())
        lru, reuse = (100 * sum(replay(prompts, num_blocks, policy())) / num_blocks_of(prompts) for policy in (LRU, ReuseBonus))
        gains[kind] = reuse - lru
    assert min(gains.values()) > 2, gains


@given(st.lists(st.integers(0, 6), min_size=1, max_size=40), st.integers(2, 6))
@settings(max_examples=100, deadline=None)
def test_belady_is_the_ceiling_for_blocks_that_stand_alone(numbers, num_blocks):
    """Belady's theorem is about pages that do not depend on each other: here each prompt is one block."""
    prompts = [array("i", [number, number]) for number in numbers]
    best = sum(replay(prompts, num_blocks, Belady(prompts, 2)))
    assert all(sum(replay(prompts, num_blocks, make())) <= best for make in POLICIES.values())


def test_belady_is_not_exactly_the_ceiling_in_a_tree():
    """Leaf before parent, and tails that are cached in part: a greedy look into the future can lose a block to plain luck."""
    prompts = [array("i", [t for t in each for _ in range(2)]) for each in ([0, 0], [0] * 5, [1], [0, 1, 0], [1])]
    best = sum(replay(prompts, 4, Belady(prompts, 2)))
    assert 0 < max(sum(replay(prompts, 4, make())) for make in POLICIES.values()) - best <= 1


@pytest.mark.parametrize("kind", ["favourites", "archive"])
def test_belady_is_far_above_all_policies_where_it_matters(kind):
    prompts = list(WORKLOADS[kind]())
    best = sum(replay(prompts, 500, Belady(prompts, 2)))
    assert all(sum(replay(prompts, 500, make())) <= best for make in POLICIES.values())


TRACE = Path(os.environ.get("PAGEDLIT_TRACES", Path(__file__).parents[2] / "shared" / "traces")) / "conversation_trace.jsonl"


@pytest.mark.skipif(not TRACE.exists(), reason="the trace is not here")
def test_the_bars_on_the_conversation_trace():
    rows = [json.loads(line) for line in TRACE.open(encoding="utf-8")]
    prompts = [prompt_of(row["hash_ids"], row["input_length"] % 512 > 0) for row in rows]
    halves = slice(0, len(rows) // 2), slice(len(rows) // 2, None)
    for num_blocks, bar in ((500, -1), (3000, 5), (10_000, 2.5), (30_000, -1)):
        found = [replay(prompts, num_blocks, policy()) for policy in (LRU, ReuseBonus)]
        first, second = (100 * (sum(found[1][half]) - sum(found[0][half])) / num_blocks_of(prompts[half]) for half in halves)
        assert first > -1 and second >= bar, (num_blocks, first, second)
