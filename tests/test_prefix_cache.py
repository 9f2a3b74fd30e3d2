"""The prefix cache against a naive oracle, over a simulated data plane, and the situations that have hurt other systems.

The data plane keeps in each slot the whole token prefix that was current when the slot was written, as real K and V depend on all
of it. The oracle keeps the token prefix, namespace and weights epoch of every published block that has not been evicted.
"""

from array import array
from collections import Counter
from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pagedlit.memory.allocator import BlockAllocator, BlockNotHeld, OutOfBlocks
from pagedlit.memory.block_table import num_blocks_for
from pagedlit.memory.copy_on_write import fork, prepare_write
from pagedlit.memory.prefix_cache import LRU, CacheNode, PrefixCache, best_partial, num_common_tokens, walk

ROOMY = 64
NAMESPACES = [(), ("cache_salt", "a"), ("lora", "a")]
TOKENS = st.integers(0, 1)


def ints(token_ids):
    return array("i", token_ids)


def num_common(a, b):
    """How many leading elements two sequences share, one by one."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


class AnyLeaf:
    """A policy as contrary as the interface allows: the idle leaf with the largest block id."""

    def __init__(self):
        self.idle = set()

    def __len__(self):
        return len(self.idle)

    def add(self, node):
        assert node not in self.idle
        self.idle.add(node)

    def remove(self, node):
        self.idle.remove(node)

    def forget(self, node):
        self.idle.discard(node)

    def victim(self):
        return max((node for node in self.idle if not node.children), key=lambda node: node.block_id)


class CheckedLRU(LRU):
    """LRU that asserts what the chapter proves: the victim has no children."""

    def victim(self):
        node = super().victim()
        assert not node.children, "LRU order is not leaf-first"
        return node


class Run:
    """A sequence as a user of the memory floor sees it: tokens, table, cursor, how far it has been computed."""

    def __init__(self, plane, token_ids, namespace=(), max_tokens=None, whole=False):
        cache = plane.cache
        match = cache.match(ints(token_ids), namespace, len(token_ids) - 1 if max_tokens is None else max_tokens)
        if whole:
            match = match.whole_blocks(cache.block_size)
        self.plane, self.token_ids, self.namespace = plane, list(token_ids), namespace
        self.table, self.cursor, self.num_computed_tokens = cache.acquire(match), match.cursor, match.num_tokens
        self.num_cached_tokens, self.epoch, self.num_copies = match.num_tokens, cache.weights_epoch, 0

    def write(self, num_tokens=None):
        """Compute the next tokens, or all that remain. Raises OutOfBlocks."""
        start = self.num_computed_tokens
        stop = len(self.token_ids) if num_tokens is None else start + num_tokens
        copies = prepare_write(self.table, start, stop)
        self.plane.copy(copies)
        for position in range(start, stop):
            self.plane.kv[self.table.slot(position)] = self.plane.cache.weights_epoch, tuple(self.token_ids[: position + 1])
        self.num_computed_tokens, self.num_copies = stop, self.num_copies + len(copies)
        return self

    def publish(self, with_tail=False):
        """Publish and check that every full block is the cache's now."""
        cache = self.plane.cache
        self.plane.publisher = self
        self.cursor = cache.publish(self.cursor, self.table, ints(self.token_ids), self.num_computed_tokens, with_tail)
        self.plane.publisher = None
        return self

    def finish(self, with_tail=True):
        self.publish(with_tail)
        self.release()
        return self

    def release(self):
        self.table.release()
        self.num_computed_tokens = 0

    def fork(self):
        """The engine publishes after every step, and forks between steps: so here."""
        self.publish()
        child = object.__new__(Run)
        child.__dict__.update(self.__dict__, table=fork(self.table), token_ids=self.token_ids[: self.num_computed_tokens], num_copies=0)
        return child

    def check(self):
        """What the table leads to is what was computed, position by position."""
        kv = self.plane.kv
        for position in range(self.num_computed_tokens):
            held = kv[self.table.slot(position)][1]
            assert held == tuple(self.token_ids[: position + 1]), f"position {position} reads another prompt's KV"


class Plane:
    """A cache, the slots behind it, and the oracle that listens to its events."""

    def __init__(self, num_blocks=ROOMY, block_size=4, policy=None, enabled=True):
        self.cache = PrefixCache(BlockAllocator(num_blocks), block_size, CheckedLRU() if policy is None else policy, enabled)
        self.kv, self.known, self.events, self.publisher = {}, {}, [], None
        self.cache.events.subscribe(self.listen)

    def listen(self, event):
        self.events.append(event)
        if event.kind == "published":
            (block_id,) = event.block_ids
            self.known[block_id] = self.content(block_id, event.num_tokens)
        if event.kind == "evicted":
            del self.known[event.block_ids[0]]

    def content(self, block_id, num_tokens):
        """What a block that is being published holds: (epoch, namespace, token prefix), from its slots alone."""
        size, run = self.cache.block_size, self.publisher
        slots = [self.kv[block_id * size + offset] for offset in range(num_tokens)]
        epochs, prefix = {epoch for epoch, _ in slots}, slots[-1][1]
        assert epochs == {self.cache.weights_epoch}, "published KV that other weights have computed"
        assert all(prefix[: len(held)] == held for _, held in slots), "the slots of one block are of different prompts"
        assert (len(prefix) - num_tokens) % size == 0 and prefix == tuple(run.token_ids[: len(prefix)])
        assert len(prefix) <= run.num_computed_tokens, "published before it was computed"
        return self.cache.weights_epoch, run.namespace, prefix

    def longest(self, token_ids, namespace):
        """The oracle: the longest prefix among all that is published, token by token."""
        key = self.cache.weights_epoch, namespace
        return max((num_common(token_ids, prefix) for *k, prefix in self.known.values() if tuple(k) == key), default=0)

    def copy(self, copies):
        """Read every source, then write; destinations are distinct."""
        size = self.cache.block_size
        assert len({c.dst for c in copies}) == len(copies)
        sources = [[self.kv[c.src * size + offset] for offset in range(c.num_tokens)] for c in copies]
        for copy, values in zip(copies, sources):
            self.kv.update(zip(range(copy.dst * size, copy.dst * size + copy.num_tokens), values))

    def check_match(self, token_ids, namespace, max_tokens=None):
        """`match` finds what the oracle finds, and the blocks hold exactly those tokens."""
        size, num_roots = self.cache.block_size, len(self.cache.roots)
        match = self.cache.match(ints(token_ids), namespace, max_tokens)
        want = self.longest(token_ids[:max_tokens], namespace)
        assert match.num_tokens == want
        assert len(match.block_ids) == num_blocks_for(want, size)
        assert match.is_partial == (match.num_tokens > match.cursor.depth * size)
        for position in range(want):
            held = self.kv[match.block_ids[position // size] * size + position % size]
            assert held == (self.cache.weights_epoch, tuple(token_ids[: position + 1]))
        assert match.whole_blocks(size).num_tokens <= want and not match.whole_blocks(size).is_partial
        assert len(self.cache.roots) == num_roots, "looking must not leave a root behind"
        return match

    def check(self, runs=()):
        """Everything that holds between calls."""
        cache = self.cache
        cache.check_invariants()
        tables = [run.table.block_ids for run in runs]
        holders = Counter(chain(cache.nodes, *tables))
        assert [holders[b] for b in range(cache.num_blocks)] == cache.allocator.ref_counts
        assert cache.num_free + len(set(chain(*tables))) == cache.num_blocks
        assert set(self.known) == set(cache.nodes), "events and tree disagree"
        assert all(root.children for root in cache.roots.values()), "an empty root is left behind"
        assert len(cache.roots) <= len(cache.nodes)
        for run in runs:
            run.check()

    def evict_all(self):
        """Evict down to the empty pool, one by one."""
        held = []
        while self.cache.num_free:
            held += self.cache.allocate()
            self.cache.check_invariants()
        assert not self.cache.nodes and not self.cache.roots and not self.known
        self.cache.release(held)


class PrefixCacheMachine(RuleBasedStateMachine):
    """Random prompts over two tokens, in a pool that is always too small."""

    @initialize(block_size=st.integers(1, 8), num_blocks=st.integers(2, 12), contrary=st.booleans())
    def start(self, block_size, num_blocks, contrary):
        self.plane = Plane(num_blocks, block_size, AnyLeaf() if contrary else None)
        self.cache, self.runs = self.plane.cache, []

    def pick(self, data):
        return data.draw(st.sampled_from(self.runs))

    @rule(prompt=st.lists(TOKENS, min_size=1, max_size=20), namespace=st.sampled_from(NAMESPACES), whole=st.booleans())
    def admit(self, prompt, namespace, whole):
        match = self.plane.check_match(prompt, namespace, len(prompt) - 1)
        run = Run(self.plane, prompt, namespace, whole=whole)
        assert run.num_cached_tokens == (match.num_tokens // self.cache.block_size * self.cache.block_size if whole else match.num_tokens)
        assert run.num_cached_tokens < len(prompt)
        self.runs.append(run)

    @precondition(lambda self: self.runs)
    @rule(data=st.data(), new=st.lists(TOKENS, min_size=1, max_size=9))
    def write(self, data, new):
        run = self.pick(data)
        missing = len(run.token_ids) - run.num_computed_tokens
        num_tokens = data.draw(st.integers(1, max(missing, len(new))))
        run.token_ids += new[: max(0, num_tokens - missing)]
        before = list(self.cache.allocator.ref_counts), self.cache.num_free, list(run.table.block_ids), len(self.plane.events)
        try:
            run.write(num_tokens)
        except OutOfBlocks:
            after = list(self.cache.allocator.ref_counts), self.cache.num_free, list(run.table.block_ids), len(self.plane.events)
            assert after == before, "OutOfBlocks changed something"

    @precondition(lambda self: self.runs)
    @rule(data=st.data())
    def publish(self, data):
        run = self.pick(data)
        was_current = run.epoch == self.cache.weights_epoch and (run.cursor.parent is None or run.cursor.block_id in self.cache.nodes)
        run.publish()
        if was_current:
            num_full = run.num_computed_tokens // self.cache.block_size
            assert run.cursor.depth == num_full and all(block_id in self.cache.nodes for block_id in run.table.block_ids[:num_full])

    @precondition(lambda self: self.runs)
    @rule(data=st.data(), with_tail=st.booleans())
    def finish(self, data, with_tail):
        run = self.pick(data)
        token_ids, num_computed, namespace = run.token_ids, run.num_computed_tokens, run.namespace
        publishes = with_tail and run.epoch == self.cache.weights_epoch and (run.cursor.parent is None or run.cursor.block_id in self.cache.nodes)
        self.runs.remove(run)
        run.finish(with_tail)
        if publishes:
            assert self.cache.match(ints(token_ids[:num_computed]), namespace).num_tokens == num_computed

    @precondition(lambda self: self.runs)
    @rule(data=st.data())
    def abort(self, data):
        run = self.pick(data)
        self.runs.remove(run)
        run.release()

    @precondition(lambda self: 0 < len(self.runs) < 5)
    @rule(data=st.data())
    def fork(self, data):
        self.runs.append(self.pick(data).fork())

    @rule(data=st.data())
    def press(self, data):
        """Somebody needs blocks: idle ones are evicted, and overwritten."""
        num_blocks = data.draw(st.integers(0, self.cache.num_free))
        block_ids = self.cache.allocate(num_blocks)
        size = self.cache.block_size
        self.plane.kv.update((block_id * size + offset, (-1, ())) for block_id in block_ids for offset in range(size))
        self.cache.release(block_ids)

    @rule(more=st.integers(1, 3))
    def ask_too_much(self, more):
        before = list(self.cache.allocator.ref_counts), dict(self.plane.known)
        with pytest.raises(OutOfBlocks):
            self.cache.allocate(self.cache.num_free + more)
        assert (list(self.cache.allocator.ref_counts), self.plane.known) == before

    @precondition(lambda self: any(self.cache.allocator.ref_counts[b] == 1 for b in self.cache.nodes))
    @rule(data=st.data())
    def steal_the_caches_reference(self, data):
        idle = [b for b in self.cache.nodes if self.cache.allocator.ref_counts[b] == 1]
        block_id = data.draw(st.sampled_from(idle))
        with pytest.raises(BlockNotHeld):
            self.cache.release([block_id])

    @rule(prompt=st.lists(TOKENS, max_size=24), namespace=st.sampled_from(NAMESPACES))
    def look(self, prompt, namespace):
        self.plane.check_match(prompt, namespace)

    @rule(new_weights=st.sampled_from([False, False, True]))
    def clear(self, new_weights):
        self.cache.clear(new_weights)
        assert not self.cache.nodes and not self.cache.roots

    @invariant()
    def all_is_well(self):
        if hasattr(self, "plane"):
            self.plane.check(self.runs)

    def teardown(self):
        if hasattr(self, "plane"):
            for run in self.runs:
                run.finish()
            assert self.cache.num_free == self.cache.num_blocks
            self.plane.check()
            self.plane.evict_all()
            self.cache.check_invariants()


TestPrefixCacheMachine = PrefixCacheMachine.TestCase
TestPrefixCacheMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


# The search, against a linear scan


@given(st.lists(st.integers(0, 2**31 - 1), max_size=9), st.lists(st.integers(0, 2**31 - 1), max_size=9), st.integers(0, 9))
def test_common_tokens_against_a_loop(a, b, num_shared):
    b = a[:num_shared] + b
    assert num_common_tokens(ints(a).tobytes(), ints(b).tobytes()) == num_common(a, b)


@given(st.lists(st.lists(st.sampled_from([0, 1, 255, 256, 2**30]), min_size=1, max_size=5).map(tuple), max_size=30), st.data())
def test_neighbours_suffice(keys, data):
    size = 5
    key = data.draw(st.lists(st.sampled_from([0, 1, 255, 256, 2**30]), max_size=size))
    root = CacheNode(None, (0, ()), -1, 0)
    for block_id, child in enumerate(dict.fromkeys(keys)):
        root.attach(CacheNode(root, ints(child).tobytes(), block_id, len(child)))
    num_tokens, child = best_partial(root, ints(key).tobytes())
    assert num_tokens == max((num_common(key, k) for k in keys), default=0)
    assert (child is None) == (num_tokens == 0)


def test_walk_stops_at_the_first_block_that_differs():
    plane = Plane(block_size=2)
    Run(plane, [1, 2, 3, 4, 5, 6]).write().finish()
    (root,) = plane.cache.roots.values()
    assert [node.num_tokens for node in walk(root, ints([1, 2, 3, 4, 5, 9]).tobytes(), 8)] == [2, 2]
    assert list(walk(root, ints([1]).tobytes(), 8)) == []


# Exact: no hash can mix prompts up


def test_a_degenerate_hash_changes_nothing():
    class Tenant:
        """Every tenant has the same hash."""

        def __init__(self, name):
            self.name = name

        def __eq__(self, other):
            return isinstance(other, Tenant) and self.name == other.name

        def __hash__(self):
            return 7

    plane = Plane()
    Run(plane, [1, 2, 3, 4, 5], Tenant("a")).write().finish()
    assert plane.check_match([1, 2, 3, 4, 5], Tenant("a")).num_tokens == 5
    assert plane.check_match([1, 2, 3, 4, 5], Tenant("b")).num_tokens == 0


def test_two_prompts_with_the_same_python_hash_stay_apart():
    one = (1, 30, 44, 60, 9, 19, 36, 59, 4, 29, 39, 63, 6, 29, 38, 62)
    two = (10, 18, 34, 56, 9, 20, 45, 50, 14, 31, 36, 58, 9, 19, 33, 58)
    plane = Plane(block_size=16)
    Run(plane, one).write().finish()
    assert plane.check_match(two, ()).num_tokens == 0
    assert plane.check_match(one, ()).num_tokens == 16


def test_the_same_tokens_after_another_prefix_are_another_block():
    plane = Plane(block_size=2)
    Run(plane, [1, 1, 5, 5]).write().finish()
    Run(plane, [2, 2, 6, 6]).write().finish()
    assert plane.check_match([2, 2, 5, 5], ()).num_tokens == 2


def test_negative_and_large_token_ids_sort_as_bytes_and_still_match():
    plane = Plane(block_size=2)
    prompts = [[255, 256], [256, 255], [2**31 - 1, 0], [0, 2**31 - 1], [-1, -2]]
    for prompt in prompts:
        Run(plane, prompt).write().finish()
    assert all(plane.check_match(prompt, ()).num_tokens == 2 for prompt in prompts)


# Namespaces and weights


def test_same_salt_hits_and_any_other_misses():
    plane = Plane()
    prompt = list(range(10))
    Run(plane, prompt, ("cache_salt", "a")).write().finish()
    assert plane.check_match(prompt, ("cache_salt", "a")).num_tokens == 10
    for other in [(), ("cache_salt", "b"), ("lora", "a"), ("cache_salt", "")]:
        assert plane.check_match(prompt, other).num_tokens == 0


def test_unique_salts_leave_no_roots_behind():
    plane = Plane(num_blocks=8, block_size=2)
    for user in range(500):
        Run(plane, [1, 2, 3, 4, 5], ("cache_salt", str(user))).write().finish()
        assert len(plane.cache.roots) <= 3, "eight blocks hold no more than two and a half answers of three blocks"
        plane.cache.check_invariants()
    plane.evict_all()
    plane.check()


def test_requests_that_publish_nothing_leave_no_roots_behind():
    plane = Plane()
    for user in range(100):
        run = Run(plane, [1, 2, 3], ("cache_salt", str(user)))
        run.publish(with_tail=True).release()
    assert not plane.cache.roots and not plane.cache.nodes


def test_new_weights_forget_everything_and_bar_the_running():
    plane = Plane(block_size=2)
    young, old = Run(plane, [1, 1, 1, 1, 1]).write(1), Run(plane, [2, 2, 2, 2, 2]).write().publish()
    plane.cache.clear(new_weights=True)
    assert plane.check_match([2, 2, 2], ()).num_tokens == 0
    for run in (young, old):  # one cursor is a root, the other a forgotten block
        run.write(len(run.token_ids) - run.num_computed_tokens or None)
        run.finish()
        assert not plane.cache.nodes and not plane.cache.roots
    Run(plane, [2, 2, 2]).write().finish()
    assert plane.check_match([2, 2, 2], ()).num_tokens == 3
    plane.check()


def test_clear_without_new_weights_keeps_what_runs():
    plane = Plane(block_size=2)
    run = Run(plane, [1, 2, 3, 4, 5]).write().publish()
    plane.cache.clear()
    assert not plane.cache.nodes and run.table.block_ids
    plane.check([run])
    run.release()
    plane.check()
    assert plane.cache.allocator.num_free == plane.cache.num_blocks


# Partly filled blocks


def test_a_published_tail_is_extended_in_place_without_a_copy():
    plane = Plane()
    first = Run(plane, [1, 2, 3, 4, 5, 6]).write().finish()
    second = Run(plane, [1, 2, 3, 4, 5, 6, 7, 8])
    assert second.num_cached_tokens == 6
    tail = second.table.block_ids[1]
    second.write(1)
    assert second.num_copies == 0 and second.table.block_ids[1] == tail
    assert plane.check_match([1, 2, 3, 4, 5, 6, 7], ()).num_tokens == 6, "the new slot is written, but not published"
    second.write(1).publish()
    assert plane.check_match([1, 2, 3, 4, 5, 6, 7, 8], ()).num_tokens == 8
    assert plane.cache.nodes[tail].num_tokens == 4
    plane.check([second])
    assert first.num_copies == 0


def test_the_sequence_that_published_its_tail_goes_on_in_place():
    plane = Plane()
    run = Run(plane, [1, 2, 3]).write().publish(with_tail=True)
    run.token_ids += [4, 5]
    run.write(2)
    assert run.num_copies == 0
    run.finish()
    assert plane.check_match([1, 2, 3, 4, 5], ()).num_tokens == 5
    plane.check()


def test_two_sequences_on_one_partial_tail():
    plane = Plane()
    Run(plane, [1, 2, 3]).write().finish()
    one, two = Run(plane, [1, 2, 3, 4]), Run(plane, [1, 2, 3, 5])
    assert one.table.block_ids == two.table.block_ids
    one.write()
    two.write()
    assert (one.num_copies, two.num_copies) == (1, 0), "the first to write copies, the last one owns the block"
    plane.check([one, two])
    one.finish()
    two.finish()
    assert plane.check_match([1, 2, 3, 4], ()).num_tokens == plane.check_match([1, 2, 3, 5], ()).num_tokens == 4
    plane.check()


def test_a_tail_that_grows_supersedes_its_shorter_sibling():
    plane = Plane()
    for length in (1, 2, 3, 4):
        Run(plane, [7] * length).write().finish()
        assert [node.num_tokens for node in plane.cache.nodes.values()] == [length]
        plane.check()


def test_a_shorter_tail_is_not_published_beside_a_longer_one():
    plane = Plane()
    Run(plane, [7, 7, 7]).write().finish()
    before = set(plane.cache.nodes)
    Run(plane, [7, 7], max_tokens=0).write().finish()
    assert set(plane.cache.nodes) == before
    plane.check()


def test_superseding_a_tail_that_somebody_holds():
    plane = Plane()
    Run(plane, [1, 2]).write().finish()
    holder = Run(plane, [1, 2, 3])
    Run(plane, [1, 2, 4, 4], max_tokens=0).write().finish()
    plane.check([holder])
    holder.write()
    assert holder.num_copies == 0, "nobody else reads the superseded block"
    holder.finish()
    assert plane.check_match([1, 2, 3], ()).num_tokens == 3 and plane.check_match([1, 2, 4, 4], ()).num_tokens == 4
    plane.check()


def test_a_match_in_the_middle_of_a_full_block_is_copied():
    plane = Plane()
    Run(plane, [1, 2, 3, 4, 9]).write().finish()
    run = Run(plane, [1, 2, 5, 6])
    assert run.num_cached_tokens == 2
    run.write()
    assert run.num_copies == 1
    assert plane.check_match([1, 2, 3, 4, 9], ()).num_tokens == 5
    plane.check([run])


def test_a_full_prompt_hit_leaves_one_token():
    for length in range(1, 10):
        plane = Plane()
        Run(plane, list(range(length))).write().finish()
        again = Run(plane, list(range(length)))
        assert again.num_cached_tokens == length - 1
        again.write()
        assert again.num_copies == (length % 4 != 1)
        again.finish()
        plane.check()
        assert len(plane.cache.nodes) == num_blocks_for(length, 4), "the copy is merged with the block it came from"


# Duplicates


def test_duplicates_computed_side_by_side_are_merged():
    plane = Plane()
    one, two = Run(plane, [1] * 9).write(), Run(plane, [1] * 9).write()
    assert not set(one.table.block_ids) & set(two.table.block_ids)
    one.publish()
    two.publish()
    assert one.table.block_ids[:2] == two.table.block_ids[:2]
    plane.check([one, two])
    assert plane.cache.allocator.num_free == ROOMY - 4, "two blocks in common, and a tail each"
    one.finish()
    two.finish()
    plane.check()
    assert plane.cache.allocator.num_free == ROOMY - 3


def test_a_duplicate_of_an_idle_block_wakes_it():
    plane = Plane(block_size=2)
    late = Run(plane, [1, 1, 1]).write()
    Run(plane, [1, 1], max_tokens=0).write().finish()
    assert len(plane.cache.policy) == 1
    late.publish()
    assert len(plane.cache.policy) == 0
    plane.check([late])


def test_a_table_is_published_before_it_is_forked():
    """Why the contract of `publish` asks for it: adoption would leave the fork with a block whose parent it does not hold."""
    plane = Plane(block_size=2)
    run = Run(plane, [1, 1, 2, 2]).write()
    Run(plane, [1, 1], max_tokens=0).write().finish()
    child = run.fork()  # publishes first
    plane.check([run, child])
    assert run.table.block_ids == child.table.block_ids
    run.release()
    plane.check([child])


# Eviction


def test_eviction_is_leaf_first_down_to_an_empty_pool():
    for policy in (CheckedLRU(), AnyLeaf()):
        plane = Plane(num_blocks=16, block_size=2, policy=policy)
        for tail in range(6):
            Run(plane, [1, 1, 2, 2, tail, tail, tail]).write().finish()
        plane.evict_all()
        plane.check()


def test_lru_evicts_the_tail_of_the_oldest_first():
    plane = Plane(num_blocks=8, block_size=2)
    old, new = Run(plane, [1, 1, 1, 1]).write(), Run(plane, [2, 2, 2, 2]).write()
    old_ids, new_ids = list(old.table.block_ids), list(new.table.block_ids)
    old.finish()
    new.finish()
    Run(plane, [1, 1, 9]).release()  # touches the old one's first block
    evicted = []
    plane.cache.events.subscribe(lambda event: evicted.extend(event.block_ids if event.kind == "evicted" else ()))
    plane.cache.allocate(8)
    assert evicted == [old_ids[1], new_ids[1], new_ids[0], old_ids[0]]


def test_out_of_blocks_evicts_nothing():
    plane = Plane(num_blocks=4, block_size=2)
    Run(plane, [1, 1, 1, 1]).write().finish()
    runner = Run(plane, [2, 2]).write()
    known = dict(plane.known)
    with pytest.raises(OutOfBlocks) as error:
        plane.cache.allocate(4)
    assert (error.value.num_needed, error.value.num_free, error.value.num_blocks) == (4, 3, 4)
    assert plane.known == known
    plane.check([runner])
    plane.cache.allocate(3)
    assert not plane.known


def test_the_caches_own_reference_cannot_be_released():
    plane = Plane(block_size=2)
    Run(plane, [1, 1, 2, 2]).write().finish()
    holder = Run(plane, [1, 1, 2])
    leaf = holder.table.block_ids[-1]
    with pytest.raises(BlockNotHeld):
        plane.cache.release([leaf, leaf])
    for block_id in (-1, ROOMY):
        with pytest.raises(BlockNotHeld):
            plane.cache.release([block_id])
        with pytest.raises(BlockNotHeld):
            plane.cache.share([block_id])
    plane.check([holder])
    holder.release()
    with pytest.raises(BlockNotHeld):
        plane.cache.release([leaf])
    plane.check()


# The rest of the contract


def test_a_disabled_cache_is_a_plain_pool():
    plane = Plane(enabled=False)
    Run(plane, [1] * 9).write().finish()
    assert not plane.cache.nodes and not plane.cache.roots
    assert plane.cache.match(ints([1] * 9)).num_tokens == 0
    assert plane.cache.allocator.num_free == ROOMY


def test_block_size_does_not_change_what_is_found():
    prompts = [[1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 9, 9], [1, 2, 3, 4, 5, 8], [2], [1, 2, 3, 4, 5, 6, 7, 8]]
    found = set()
    for block_size in range(1, 9):
        plane = Plane(block_size=block_size)
        found.add(tuple(Run(plane, prompt).write().finish().num_cached_tokens for prompt in prompts))
    assert found == {(0, 3, 5, 0, 7)}


def test_events_tell_the_story():
    plane = Plane(num_blocks=3, block_size=2)
    Run(plane, [1, 1, 1]).write().finish()
    Run(plane, [1, 1, 1, 1]).write().finish()
    plane.cache.allocate(3)
    kinds = [(event.kind, event.num_tokens) for event in plane.events if event.kind in ("published", "hit", "evicted")]
    assert kinds == [
        ("published", 2), ("published", 1), ("hit", 3),
        ("evicted", 1), ("published", 2), ("evicted", 2), ("evicted", 2),
    ]  # fmt: skip


def test_max_tokens_cuts_the_prompt():
    plane = Plane()
    Run(plane, list(range(10))).write().finish()
    for max_tokens in range(11):
        assert plane.check_match(list(range(10)), (), max_tokens).num_tokens == max_tokens
    assert plane.check_match([], ()).num_tokens == 0


def test_many_siblings():
    """Every prompt differs from its first token on: one root with as many children as prompts."""
    plane = Plane(num_blocks=4000, block_size=2)
    for first in range(4000):
        Run(plane, [first, 0]).write().finish()
    assert all(plane.cache.match(ints([first, 0, 0])).num_tokens == 2 for first in range(0, 4000, 97))
    assert plane.cache.match(ints([5000, 0])).num_tokens == 0
    plane.cache.check_invariants()
