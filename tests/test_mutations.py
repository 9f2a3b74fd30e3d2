"""Does the net hold? Each documented mistake is made on purpose, one at a time; a bounded, seeded run must notice every one of them."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import toy_world
from toy_world import random_life

from pagedlit.memory import prefix_cache
from pagedlit.memory.block_table import BlockTable
from pagedlit.memory.prefix_cache import PrefixCache
from pagedlit.serving import scheduler
from pagedlit.serving.engine import Engine
from pagedlit.serving.scheduler import ForwardBatch
from pagedlit.serving.sequence import Sequence, SequenceStatus

NUM_LIVES = 120  # of 60 moves each; unmutated, all of them pass


def live(num_lives: int = NUM_LIVES) -> None:
    """The same random lives every time."""
    for seed in range(num_lives):
        random_life(random.Random(seed))


def after(function: Callable, change: Callable) -> Callable:
    """The function, with what it returns changed."""
    return lambda *args, **kwargs: change(function(*args, **kwargs))


def shift_slots(batch_add: Callable) -> Callable:
    """A decode writes to the slot of the step before."""

    def add(self: ForwardBatch, seq: Sequence, num_tokens: int, *others: object) -> None:
        batch_add(self, seq, num_tokens, *others)
        if num_tokens == 1 and seq.num_computed_tokens:
            self.slot_mapping[-1] = seq.table.slot(seq.num_computed_tokens - 1)

    return add


def add_with(batch_add: Callable, change: Callable[[ForwardBatch], None]) -> Callable:
    """Another mistake in the batch, for every sequence added."""

    def add(self: ForwardBatch, *args: object) -> None:
        batch_add(self, *args)
        change(self)

    return add


def publish_early(schedule_one: Callable) -> Callable:
    """Blocks are published when they are planned, not when they have been written."""

    def plan(state: scheduler.SchedulerState, batch: ForwardBatch, seq: Sequence, num_tokens: int) -> None:
        schedule_one(state, batch, seq, num_tokens)
        if state.scheduled and state.scheduled[-1].seq is seq:
            seq.num_computed_tokens += num_tokens
            scheduler.publish(state.cache, seq)
            seq.num_computed_tokens -= num_tokens

    return plan


def publish_sampled(publish: Callable) -> Callable:
    """The token that has just been sampled, and not been computed, is published with the tail."""

    def careless(cache: PrefixCache, seq: Sequence, with_tail: bool = False) -> None:
        num_computed_tokens = seq.num_computed_tokens
        if with_tail and num_computed_tokens % cache.block_size and len(seq.token_ids) % cache.block_size and seq.num_behind == 1:
            seq.num_computed_tokens += 1
        publish(cache, seq, with_tail)
        seq.num_computed_tokens = num_computed_tokens

    return careless


def resume_as_decode(start_running: Callable) -> Callable:
    """A preempted sequence had been decoding, so it decodes, whatever has become of its blocks."""

    def careless(state: scheduler.SchedulerState, seq: Sequence, match: object) -> None:
        was_preempted = seq.status is SequenceStatus.PREEMPTED
        start_running(state, seq, match)
        if was_preempted:
            seq.num_computed_tokens = len(seq.token_ids) - 1

    return careless


def forget_count(start_running: Callable) -> Callable:
    """The hit is used, but its tokens are computed again, into blocks that others read."""

    def careless(state: scheduler.SchedulerState, seq: Sequence, match: object) -> None:
        start_running(state, seq, match)
        seq.num_computed_tokens = 0

    return careless


def free_early(take_in: Callable) -> Callable:
    """A sequence that crosses into a new block lets the one before go, as if its window had passed."""

    def careless(state: scheduler.SchedulerState, token_ids: list[int]) -> list[Sequence]:
        sampled = take_in(state, token_ids)
        for seq in sampled:
            if seq.table and len(seq.table) > 1 and seq.num_computed_tokens % state.block_size == 1:
                state.cache.release([seq.table.block_ids[-2]])
        return sampled

    return careless


MISTAKES: dict[str, tuple[object, str, Callable]] = {  # what goes wrong: where, and how
    "copies are dropped": (scheduler, "prepare_write", lambda f: after(f, lambda copies: [])),
    "a copy is one token short": (
        scheduler, "prepare_write", lambda f: after(f, lambda copies: [c._replace(num_tokens=c.num_tokens - 1) for c in copies]),
    ),
    "every block is writable": (PrefixCache, "is_writable", lambda f: lambda self, block_id, offset: True),
    "the cache's own tokens are overwritten": (
        PrefixCache, "is_writable", lambda f: lambda self, b, offset: self.allocator.ref_counts[b] == 1 + (b in self.nodes),
    ),
    "fork takes no references": (
        scheduler, "fork", lambda f: lambda table: BlockTable(table.pool, table.block_size, table.block_ids),
    ),
    "the namespace is ignored": (
        PrefixCache, "match", lambda f: lambda self, token_ids, namespace=(), max_tokens=None: f(self, token_ids, (), max_tokens),
    ),
    "a hit may cover the whole prompt": (
        PrefixCache, "match", lambda f: lambda self, token_ids, namespace=(), max_tokens=None: f(self, token_ids, namespace),
    ),
    "a partial hit is one token too long": (
        PrefixCache, "match", lambda f: after(f, lambda m: m._replace(num_tokens=m.num_tokens + m.is_partial)),
    ),
    "a hit's tokens are computed again in place": (scheduler, "start_running", forget_count),
    "blocks are not adopted": (prefix_cache, "adopt", lambda f: lambda *args: None),
    "blocks are published before they are written": (scheduler, "schedule_one", publish_early),
    "a sampled token is published with the tail": (scheduler, "publish", publish_sampled),
    "a decode writes to a stale slot": (ForwardBatch, "add", shift_slots),
    "positions start at zero": (
        ForwardBatch, "add", lambda f: add_with(f, lambda batch: batch.positions.__setitem__(-1, 0)),
    ),
    "a sequence reads one token less": (
        ForwardBatch, "add", lambda f: add_with(f, lambda batch: batch.seq_lens.__setitem__(-1, max(1, batch.seq_lens[-1] - 1))),
    ),
    "everybody samples with the same seed": (
        ForwardBatch, "add", lambda f: add_with(f, lambda batch: batch.seeds and batch.seeds.__setitem__(-1, 1)),
    ),
    "a block is freed too early": (scheduler, "take_in", free_early),
    "blocks are not given back": (BlockTable, "release", lambda f: lambda self: None),
    "a preempted sequence resumes as a decode": (scheduler, "start_running", resume_as_decode),
    "idle blocks of the hit count as room": (scheduler, "idle_nodes", lambda f: lambda *args: []),
}


GARBLES = [  # wrong slots, missing copies, stale reads: the text alone gives them away
    "copies are dropped", "a copy is one token short", "every block is writable", "the cache's own tokens are overwritten",
    "a partial hit is one token too long", "blocks are published before they are written",
    "a decode writes to a stale slot", "positions start at zero", "a sequence reads one token less", "everybody samples with the same seed",
    "a preempted sequence resumes as a decode",
]


def make(mistake: str, monkeypatch: pytest.MonkeyPatch, mistakes: dict = MISTAKES) -> None:
    """Put a mistake in place."""
    where, name, change = mistakes[mistake]
    monkeypatch.setattr(where, name, change(getattr(where, name)))


def test_there_are_as_many_as_chapter_07_says() -> None:
    assert len(MISTAKES) == 20


def test_without_a_mistake_all_is_well() -> None:
    live()


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_noticed(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make(mistake, monkeypatch)
    with pytest.raises((AssertionError, IndexError, KeyError, ValueError)):
        live()


@pytest.mark.parametrize("mistake", GARBLES)
def test_text_alone_gives_it_away(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Engine, "check_invariants", lambda self: None)
    monkeypatch.setattr(toy_world, "check_batch", lambda batch, num_blocks: None)
    make(mistake, monkeypatch)
    with pytest.raises(AssertionError, match=r"sequence \d+: .* is not"):
        live()
