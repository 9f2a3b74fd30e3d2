"""The block allocator against a list of counters that looks at everything, with every error in between."""

import pickle
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pagedlit.memory.allocator import BlockAllocator, BlockNotHeld, Event, EventStream, OutOfBlocks, check_held

NUM_BLOCKS = 6
BLOCK_IDS = st.lists(st.integers(-2, NUM_BLOCKS + 1), max_size=5)  # some of them outside the pool, some twice


def snapshot(pool):
    """All of a pool's state."""
    return list(pool.ref_counts), list(pool._free), pool.num_free


class AllocatorMachine(RuleBasedStateMachine):
    """Any calls, right and wrong, in any order."""

    @initialize()
    def start(self):
        self.log = []
        self.pool = BlockAllocator(NUM_BLOCKS)
        self.pool.events.subscribe(self.log.append)
        self.counts = Counter({block_id: 0 for block_id in range(NUM_BLOCKS)})

    def refuses(self, error, call, *args):
        """The call raises and leaves no trace, not even an event."""
        before, num_events = snapshot(self.pool), len(self.log)
        with pytest.raises(error) as caught:
            call(*args)
        assert snapshot(self.pool) == before and len(self.log) == num_events
        return caught.value

    @rule(num_blocks=st.integers(0, NUM_BLOCKS + 2))
    def allocate(self, num_blocks):
        free = {block_id for block_id, count in self.counts.items() if count == 0}
        if num_blocks > len(free):
            error = self.refuses(OutOfBlocks, self.pool.allocate, num_blocks)
            assert (error.num_needed, error.num_free, error.num_blocks) == (num_blocks, len(free), NUM_BLOCKS)
            return
        block_ids = self.pool.allocate(num_blocks)
        assert len(block_ids) == len(set(block_ids)) == num_blocks and free.issuperset(block_ids)
        self.counts.update(block_ids)
        assert not block_ids or self.log[-1] == Event("allocated", tuple(block_ids))

    @rule(block_ids=BLOCK_IDS)
    def share(self, block_ids):
        if any(self.counts.get(block_id, 0) == 0 for block_id in block_ids):
            self.refuses(BlockNotHeld, self.pool.share, block_ids)
            return
        self.pool.share(block_ids)
        self.counts.update(block_ids)
        assert not block_ids or self.log[-1] == Event("shared", tuple(block_ids))

    @rule(block_ids=BLOCK_IDS)
    def release(self, block_ids):
        if any(self.counts.get(block_id, 0) < num for block_id, num in Counter(block_ids).items()):
            self.refuses(BlockNotHeld, self.pool.release, block_ids)
            return
        self.pool.release(block_ids)
        self.counts.subtract(block_ids)
        assert not block_ids or self.log[-1] == Event("released", tuple(block_ids))

    @precondition(lambda self: any(self.counts.values()))
    @rule(data=st.data())
    def release_some_of_what_is_held(self, data):
        held = sorted(self.counts.elements())
        self.release(data.draw(st.permutations(held))[: data.draw(st.integers(1, len(held)))])

    @invariant()
    def agrees_with_the_counters(self):
        self.pool.check_invariants()
        assert self.pool.ref_counts == [self.counts[block_id] for block_id in range(NUM_BLOCKS)]
        assert self.pool.num_free == sum(count == 0 for count in self.counts.values())
        assert [self.pool.is_writable(block_id, 0) for block_id in range(NUM_BLOCKS)] == [
            self.counts[block_id] == 1 for block_id in range(NUM_BLOCKS)
        ]

    @invariant()
    def events_tell_the_whole_story(self):
        counts = Counter()
        for event in self.log:
            (counts.subtract if event.kind == "released" else counts.update)(event.block_ids)
        assert +counts == +self.counts

    def teardown(self):
        if hasattr(self, "pool"):
            self.pool.release(list(self.counts.elements()))
            assert self.pool.num_free == NUM_BLOCKS
            self.pool.check_invariants()


AllocatorMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestAllocator = AllocatorMachine.TestCase


@given(st.lists(st.integers(0, 4), max_size=30))
def test_nothing_is_lost_however_much_is_asked_for(sizes):
    pool, held = BlockAllocator(9), []
    for size in sizes:
        try:
            held += pool.allocate(size)
        except OutOfBlocks:
            assert len(held) + size > 9
    assert len(held) == len(set(held)) == 9 - pool.num_free
    pool.release(held)
    assert sorted(pool.allocate(9)) == list(range(9))


@pytest.mark.parametrize("times", [2, 3])
def test_a_double_free_raises_and_the_block_stays_on_the_list_once(times):
    pool = BlockAllocator(4)
    block_ids = pool.allocate(3)
    pool.release(block_ids)
    for _ in range(times):
        with pytest.raises(BlockNotHeld, match="block 1 has 0 holders, not 1: it was released already"):
            pool.release([1])
    assert sorted(pool.allocate(4)) == [0, 1, 2, 3]


@pytest.mark.parametrize("block_id", [-1, 4, 10**9])
@pytest.mark.parametrize("call", [BlockAllocator.share, BlockAllocator.release])
def test_an_id_outside_the_pool_raises(call, block_id):
    pool = BlockAllocator(4)
    block_ids = pool.allocate(4)
    with pytest.raises(BlockNotHeld, match=f"block {block_id} is not in this pool of 4 blocks"):
        call(pool, [*block_ids, block_id])
    assert pool.ref_counts == [1] * 4


def test_one_call_may_name_a_block_as_often_as_it_is_held():
    pool = BlockAllocator(2)
    pool.allocate()
    pool.share([0, 0])
    assert pool.ref_counts == [3, 0]
    with pytest.raises(BlockNotHeld):
        pool.release([0] * 4)
    pool.release([0] * 3)
    assert pool.num_free == 2


def test_the_block_freed_last_goes_out_first():
    pool = BlockAllocator(8)
    assert pool.allocate(4) == [0, 1, 2, 3]
    pool.release([2, 0])
    assert pool.allocate(3) == [0, 2, 4]


@pytest.mark.parametrize("num_blocks", [0, -1])
def test_a_pool_has_blocks(num_blocks):
    with pytest.raises(ValueError, match="at least one block"):
        BlockAllocator(num_blocks)


def test_out_of_blocks_names_the_remedy_and_crosses_processes():
    error = pickle.loads(pickle.dumps(OutOfBlocks(3, 1, 64)))
    assert isinstance(error, OutOfBlocks) and (error.num_needed, error.num_free, error.num_blocks) == (3, 1, 64)
    assert "need 3 blocks, 1 of 64 free" in str(error) and "num_blocks" in str(error)


def test_check_held_is_given_as_many_holders_as_it_finds():
    check_held([2, 0], {0: 2})
    with pytest.raises(BlockNotHeld):
        check_held([2, 0], {0: 3})


@pytest.mark.parametrize("spoil", [lambda pool: pool.ref_counts.__setitem__(0, 0), lambda pool: pool._free.append(3), lambda pool: pool._free.pop()])
def test_check_invariants_notices(spoil):
    pool = BlockAllocator(4)
    pool.allocate(2)
    pool.check_invariants()
    spoil(pool)
    with pytest.raises(AssertionError, match="disagree"):
        pool.check_invariants()


def test_a_silent_stream_makes_no_events(monkeypatch):
    pool = BlockAllocator(4)
    assert not pool.events
    monkeypatch.setattr(EventStream, "emit", None)  # calling it would raise
    pool.share(pool.allocate(2))
    pool.release([0, 1])


def test_listeners_hear_everything_in_order_until_they_unsubscribe():
    stream, heard = EventStream(), []
    stop = stream.subscribe(lambda event: heard.append(("first", event.kind)))
    stream.subscribe(lambda event: heard.append(("second", event.kind)))
    stream.emit("hit", [1, 2], seq_id=7, num_tokens=5)
    stop()
    stream.emit("evicted")
    assert heard == [("first", "hit"), ("second", "hit"), ("second", "evicted")]


def test_a_listener_may_unsubscribe_while_it_is_told():
    stream, heard = EventStream(), []

    def once(event):
        heard.append(event.kind)
        stop()

    stop = stream.subscribe(once)
    stream.subscribe(lambda event: heard.append("other"))
    stream.emit("allocated")
    stream.emit("allocated")
    assert heard == ["allocated", "other", "other"]


def test_pools_share_a_stream_only_if_told_to():
    events, log = EventStream(), []
    events.subscribe(log.append)
    BlockAllocator(2, events).allocate()
    BlockAllocator(2).allocate()
    assert log == [Event("allocated", (0,))]
