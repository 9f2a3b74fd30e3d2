"""Block tables against position-by-position arithmetic, and against lists of lists that share one pool."""

import math
from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from pagedlit.memory.allocator import BlockAllocator, BlockNotHeld, OutOfBlocks
from pagedlit.memory.block_table import BlockTable, num_blocks_for, slots_of


def make_table(block_ids, block_size):
    """A table over given blocks of a pool that is wholly held."""
    pool = BlockAllocator(max(block_ids, default=0) + 1)
    pool.allocate(pool.num_blocks)
    return BlockTable(pool, block_size, block_ids)


@given(st.integers(0, 10**12), st.integers(1, 4096))
def test_num_blocks_for_rounds_up(num_tokens, block_size):
    num_blocks = num_blocks_for(num_tokens, block_size)
    assert (num_blocks - 1) * block_size < num_tokens <= num_blocks * block_size
    if num_tokens < 2**50:
        assert num_blocks == math.ceil(num_tokens / block_size)


@given(st.data())
def test_slot_mapping_is_slot_for_each_position(data):
    block_size = data.draw(st.integers(1, 17))
    block_ids = data.draw(st.lists(st.integers(0, 300), max_size=9))  # any order, also the same block twice
    table, capacity = make_table(block_ids, block_size), len(block_ids) * block_size
    start = data.draw(st.integers(0, capacity))
    stop = data.draw(st.integers(start, capacity))
    slots = table.slot_mapping(start, stop)
    expected = [block_ids[p // block_size] * block_size + p % block_size for p in range(start, stop)]
    assert slots.tolist() == expected == [table.slot(p) for p in range(start, stop)]
    assert slots.typecode == "q" and slots.itemsize == 8


@given(st.integers(-30, 30), st.integers(-30, 30), st.integers(0, 3), st.integers(1, 5))
def test_slot_mapping_refuses_what_is_not_in_the_table(start, stop, num_blocks, block_size):
    block_ids = array("i", range(num_blocks))
    if 0 <= start <= stop <= num_blocks * block_size:
        assert len(slots_of(block_ids, block_size, start, stop)) == stop - start
    else:
        with pytest.raises(IndexError, match=f"table of {num_blocks} blocks of {block_size}"):
            slots_of(block_ids, block_size, start, stop)


@pytest.mark.parametrize("position", [-1, -4, -12, 12, 13, 10**6])
def test_slot_refuses_what_is_not_in_the_table(position):
    with pytest.raises(IndexError):
        make_table([2, 0, 1], 4).slot(position)


def test_slots_beyond_32_bits():
    block_ids = array("i", [2**31 - 1])
    assert slots_of(block_ids, 16, 15, 16).tolist() == [(2**31 - 1) * 16 + 15]


def test_arrays_are_viewed_without_a_copy():
    table = make_table([3, 1, 2], 4)
    view = memoryview(table.block_ids)
    assert (view.format, view.itemsize, view.tolist()) == ("i", 4, [3, 1, 2])
    table.block_ids[1] = 0
    assert view.tolist() == [3, 0, 2]


def test_a_table_has_no_other_state():
    with pytest.raises(AttributeError):
        make_table([0], 4).num_tokens = 3


def test_release_twice_gives_back_once():
    pool = BlockAllocator(4)
    table = BlockTable(pool, 4)
    table.grow(9)
    table.release()
    table.release()
    assert len(table) == 0 and pool.num_free == 4
    pool.check_invariants()


def test_release_is_atomic_when_a_block_was_given_back_behind_the_tables_back():
    pool = BlockAllocator(4)
    table = BlockTable(pool, 4)
    table.grow(9)
    pool.release([table.block_ids[0]])
    with pytest.raises(BlockNotHeld):
        table.release()
    assert len(table) == 3 and pool.ref_counts == [0, 1, 1, 0]


@given(st.lists(st.integers(0, 200), min_size=1, max_size=8), st.integers(1, 16))
def test_grow_arrives_at_the_largest_goal_whatever_the_steps(goals, block_size):
    pool = BlockAllocator(201)
    table = BlockTable(pool, block_size)
    for goal in goals:
        table.grow(goal)
        assert len(table) * block_size >= goal
    assert len(table) == num_blocks_for(max(goals), block_size) == 201 - pool.num_free
    assert len(table) * block_size - max(goals) < block_size


@given(st.integers(1, 300), st.integers(1, 16))
def test_the_next_sequence_gets_the_same_blocks_in_the_same_order(num_tokens, block_size):
    pool = BlockAllocator(300)
    table = BlockTable(pool, block_size)
    table.grow(num_tokens)
    block_ids = table.block_ids.tolist()
    table.release()
    table.grow(num_tokens)
    assert table.block_ids.tolist() == block_ids


class TablesMachine(RuleBasedStateMachine):
    """Several sequences grow, read and end in one pool that is too small for them."""

    NUM_BLOCKS = 7

    @initialize(block_size=st.integers(1, 5))
    def start(self, block_size):
        self.block_size = block_size
        self.pool = BlockAllocator(self.NUM_BLOCKS)
        self.tables = [BlockTable(self.pool, block_size) for _ in range(3)]
        self.lens = [0, 0, 0]
        self.content = [None] * (self.NUM_BLOCKS * block_size)

    @rule(index=st.integers(0, 2), num_more=st.integers(0, 12))
    def write(self, index, num_more):
        table, start = self.tables[index], self.lens[index]
        before = [t.block_ids.tolist() for t in self.tables], list(self.pool.ref_counts), list(self.pool._free)
        num_missing = max(0, math.ceil((start + num_more) / self.block_size) - len(table))
        try:
            table.grow(start + num_more)
        except OutOfBlocks as error:
            assert error.num_needed == num_missing > error.num_free == self.pool.num_free
            assert before == ([t.block_ids.tolist() for t in self.tables], self.pool.ref_counts, self.pool._free)
            return
        assert table.block_ids.tolist()[: len(before[0][index])] == before[0][index], "growing moved a block"
        self.lens[index] += num_more
        for position, slot in enumerate(table.slot_mapping(start, start + num_more), start):
            self.content[slot] = (index, position)

    @rule(index=st.integers(0, 2))
    def end(self, index):
        self.tables[index].release()
        self.lens[index] = 0

    @invariant()
    def everybody_reads_what_it_wrote(self):
        for index, table in enumerate(self.tables):
            slots = table.slot_mapping(0, self.lens[index])
            assert [self.content[slot] for slot in slots] == [(index, p) for p in range(self.lens[index])]

    @invariant()
    def tables_hold_what_they_need_and_no_more(self):
        self.pool.check_invariants()
        held = [block_id for table in self.tables for block_id in table.block_ids]
        assert len(held) == len(set(held)) == self.NUM_BLOCKS - self.pool.num_free
        assert [len(table) for table in self.tables] == [math.ceil(n / self.block_size) for n in self.lens]


TablesMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestTables = TablesMachine.TestCase
