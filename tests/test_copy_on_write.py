"""Forks against an oracle in which every sequence owns its text.

The data plane is a list of slots. Each write puts a mark in a slot that was never used before, so that a slot read by the wrong
sequence, a copy forgotten or a copy too short gives a mark that the oracle does not expect. Slots of free blocks are poisoned.
"""

from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pagedlit.memory.allocator import BlockAllocator, BlockNotHeld, OutOfBlocks
from pagedlit.memory.block_table import BlockTable, num_blocks_for
from pagedlit.memory.copy_on_write import BlockCopy, fork, prepare_write, shared_blocks

NUM_BLOCKS = 9


class Seq:
    """A table, and what it must read."""

    def __init__(self, table, marks=()):
        self.table, self.marks = table, list(marks)


class ForkMachine(RuleBasedStateMachine):
    """Sequences fork, rewrite, grow and end; the writes of a step are prepared together and applied together."""

    @initialize(block_size=st.integers(1, 5))
    def start(self, block_size):
        self.size, self.fresh_mark, self.log = block_size, count(), []
        self.pool = BlockAllocator(NUM_BLOCKS)
        self.pool.events.subscribe(self.log.append)
        self.slots = ["poison"] * (NUM_BLOCKS * block_size)
        self.seqs = [Seq(BlockTable(self.pool, block_size))]

    def state(self):
        """Everything that an error must leave alone."""
        return list(self.pool.ref_counts), list(self.pool._free), [seq.table.block_ids.tolist() for seq in self.seqs], len(self.log)

    def prepare(self, seq, start, stop):
        """`prepare_write`, held to its contract. Returns the copies, or None when the pool was short."""
        shared = [i for i in range(start // self.size, min(len(seq.table), num_blocks_for(stop, self.size)))
                  if sum(seq.table.block_ids[i] in other.table.block_ids for other in self.seqs) > 1]
        assert shared_blocks(seq.table, start, stop) == shared
        num_needed = len(shared) + max(0, num_blocks_for(stop, self.size) - len(seq.table))
        before, old, num_free = self.state(), seq.table.block_ids.tolist(), self.pool.num_free
        try:
            copies = prepare_write(seq.table, start, stop)
        except OutOfBlocks as error:
            assert error.num_needed == num_needed > num_free
            assert self.state() == before
            return None
        assert num_free - self.pool.num_free == num_needed, "it took more than it needed, or freed a block that others hold"
        kept = {i: min(self.size, max(0, start - i * self.size)) for i in shared}
        assert copies == [BlockCopy(old[i], seq.table.block_ids[i], n) for i, n in kept.items() if n]
        assert [(e.block_ids, e.num_tokens) for e in self.log[before[3] :] if e.kind == "copied"] == [((c.src, c.dst), c.num_tokens) for c in copies]
        untouched = [i for i in range(len(old)) if i not in shared]
        assert [seq.table.block_ids[i] for i in untouched] == [old[i] for i in untouched]
        self.nobody_else_reads(seq, start, stop)
        return copies

    def nobody_else_reads(self, seq, start, stop):
        """The slots to be written are readable through this table alone."""
        written = set(seq.table.slot_mapping(start, stop))
        for other in self.seqs:
            if other is not seq:
                assert written.isdisjoint(other.table.slot_mapping(0, len(other.table) * self.size))

    def apply(self, copies):
        """All sources are read before any destination changes."""
        assert len({copy.dst for copy in copies}) == len(copies), "two copies into one block"
        sources = [self.slots[copy.src * self.size :][: copy.num_tokens] for copy in copies]
        for copy, marks in zip(copies, sources):
            self.slots[copy.dst * self.size : copy.dst * self.size + copy.num_tokens] = marks

    def write(self, seq, start, stop):
        """New marks from `start` on; what stood behind is no longer valid."""
        marks = [next(self.fresh_mark) for _ in range(start, stop)]
        for slot, mark in zip(seq.table.slot_mapping(start, stop), marks):
            self.slots[slot] = mark
        seq.marks = seq.marks[:start] + marks

    @precondition(lambda self: len(self.seqs) < 6)
    @rule(data=st.data())
    def fork(self, data):
        parent = data.draw(st.sampled_from(self.seqs))
        num_free = self.pool.num_free
        child = fork(parent.table)
        assert child.block_ids == parent.table.block_ids and child.block_ids is not parent.table.block_ids
        assert self.pool.num_free == num_free, "a fork took memory"
        self.seqs.append(Seq(child, parent.marks))

    @rule(data=st.data())
    def step(self, data):
        """Some sequences write, most at their end, some further back; one of the others may be aborted half way."""
        todo = data.draw(st.lists(st.sampled_from(self.seqs), unique_by=id, min_size=1))
        copies, writes = [], []
        for seq in todo:
            back = data.draw(st.sampled_from([0, 0, 0, 1, 3]))
            start = max(0, len(seq.marks) - back)
            stop = start + data.draw(st.integers(1, 8))
            done = self.prepare(seq, start, stop)
            if done is not None:
                copies += done
                writes.append((seq, start, stop))
            idle = [other for other in self.seqs if other not in todo]
            if idle and data.draw(st.booleans()):
                self.remove(idle[0])
        self.apply(copies)
        for write in writes:
            self.write(*write)

    def remove(self, seq):
        seq.table.release()
        self.seqs = [other for other in self.seqs if other is not seq]

    @rule(data=st.data())
    def end(self, data):
        self.remove(data.draw(st.sampled_from(self.seqs)))
        if not self.seqs:
            self.seqs = [Seq(BlockTable(self.pool, self.size))]

    @invariant()
    def everybody_reads_its_own_text(self):
        for block_id in self.pool._free:
            self.slots[block_id * self.size : (block_id + 1) * self.size] = ["poison"] * self.size
        for seq in self.seqs:
            assert [self.slots[slot] for slot in seq.table.slot_mapping(0, len(seq.marks))] == seq.marks

    @invariant()
    def every_reference_belongs_to_a_table(self):
        self.pool.check_invariants()
        held = [block_id for seq in self.seqs for block_id in seq.table.block_ids]
        assert self.pool.ref_counts == [held.count(block_id) for block_id in range(NUM_BLOCKS)]

    def teardown(self):
        for seq in getattr(self, "seqs", ()):
            seq.table.release()
        if hasattr(self, "pool"):
            assert self.pool.num_free == NUM_BLOCKS


ForkMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=25, deadline=None)
TestFork = ForkMachine.TestCase


def table_of(num_tokens, block_size=4, num_blocks=16):
    """A pool, and a table of so many tokens in it."""
    pool = BlockAllocator(num_blocks)
    table = BlockTable(pool, block_size)
    table.grow(num_tokens)
    return pool, table


@given(st.integers(1, 40), st.integers(2, 5), st.randoms())
def test_n_holders_make_at_most_n_minus_1_copies_in_any_order(num_tokens, num_holders, random):
    pool, table = table_of(num_tokens, num_blocks=64)
    tables = [table] + [fork(table) for _ in range(num_holders - 1)]
    random.shuffle(tables)
    copies = [prepare_write(each, num_tokens, num_tokens + 1) for each in tables]
    partly_filled = num_tokens % 4 > 0
    assert [len(each) for each in copies] == [int(partly_filled)] * (num_holders - 1) + [0]
    assert all(copy.num_tokens == num_tokens % 4 for each in copies for copy in each)
    assert pool.num_blocks - pool.num_free == num_tokens // 4 + num_holders


def test_fork_is_atomic_when_a_block_is_not_held():
    pool, table = table_of(12)
    pool.release([table.block_ids[2]])
    with pytest.raises(BlockNotHeld):
        fork(table)
    assert pool.ref_counts[:3] == [1, 1, 0]


def test_fork_works_in_a_full_pool():
    pool, table = table_of(8, num_blocks=2)
    child = fork(table)
    assert pool.num_free == 0 and child.block_ids == table.block_ids
    with pytest.raises(OutOfBlocks):
        prepare_write(child, 7, 8)
    table.release()
    assert prepare_write(child, 7, 8) == []


def test_prepare_write_is_atomic_when_only_part_of_it_fits():
    pool, table = table_of(10, num_blocks=5)
    child = fork(table)
    before = table.block_ids[:], list(pool.ref_counts)
    with pytest.raises(OutOfBlocks) as caught:
        prepare_write(child, 2, 14)  # three shared blocks and a missing one, two are free
    assert (caught.value.num_needed, caught.value.num_free) == (4, 2)
    assert (child.block_ids, pool.ref_counts) == before


def test_a_shared_block_of_which_nothing_is_kept_is_replaced_without_a_copy():
    pool, table = table_of(8)
    child, log = fork(table), []
    pool.events.subscribe(log.append)
    assert prepare_write(child, 4, 6) == []
    assert child.block_ids[0] == table.block_ids[0] and child.block_ids[1] != table.block_ids[1]
    assert [event.kind for event in log] == ["allocated", "released"]


def test_writing_nothing_at_the_end_of_full_blocks_changes_nothing():
    pool, table = table_of(8)
    child = fork(table)
    assert prepare_write(child, 8, 8) == [] and child.block_ids == table.block_ids and pool.num_free == 14


@pytest.mark.parametrize("block_size", [1, 16])
def test_four_answers_to_a_long_prompt(block_size):
    pool, table = table_of(2008, block_size, num_blocks=4000)
    tables = [table] + [fork(table) for _ in range(3)]
    copies = [copy for each in tables for copy in prepare_write(each, 2008, 2208)]
    num_shared, num_own = 2008 // block_size, num_blocks_for(2208, block_size) - 2008 // block_size
    assert pool.num_blocks - pool.num_free == num_shared + 4 * num_own
    assert sum(copy.num_tokens for copy in copies) == 3 * (2008 % block_size)
