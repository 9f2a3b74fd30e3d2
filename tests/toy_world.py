"""What the serving tests share: an oracle for the text of every sequence, and a random life of an engine that checks it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable

from pagedlit.serving.ahead import AheadEngine, ToyDevice, ToyStep, build_ahead_engine
from pagedlit.serving.engine import Engine, ToyRunner, build_engine, toy_reference
from pagedlit.serving.scheduler import ForwardBatch, RunnerOutput
from pagedlit.serving.sequence import Logprob, RequestTooLong, SamplingParams, Sequence, SequenceStatus, namespace_of

VOCAB_SIZE = 4  # few tokens, so that prompts share prefixes and stop tokens are met


class RunnerFailed(Exception):
    """What `FlakyRunner` raises."""


class BadBatch(BaseException):
    """What `FlakyDevice` says to a batch that no runner should get: nothing that an engine would try again."""


def check_batch(batch: ForwardBatch, num_blocks: int) -> None:
    """Everything that a kernel takes for granted, so that it may: shapes, ranges, and that no two tokens write to one slot."""
    num_rows, num_seqs, size = len(batch.token_ids), len(batch.seq_ids), batch.block_size
    assert len(batch.positions) == len(batch.slot_mapping) == num_rows == batch.query_start_loc[-1] > 0
    assert len(batch.query_start_loc) == len(batch.block_table_start) == num_seqs + 1 == len(batch.seq_lens) + 1
    assert len(batch.logits_rows) == len(batch.seeds) == len(batch.output_lens) == len(batch.sampling)
    assert len(batch.prompt_rows) == len(batch.prompt_targets) == len(batch.prompt_tops) <= num_rows
    assert len(set(batch.slot_mapping)) == num_rows, "two tokens write to one slot"
    assert all(0 <= block_id < num_blocks for block_id in batch.block_tables), "a block id is out of range"
    assert len({copy.dst for copy in batch.copies}) == len(batch.copies), "two copies have one destination"
    assert all(0 < copy.num_tokens <= size and copy.src != copy.dst for copy in batch.copies)
    for s in range(num_seqs):
        rows = range(*batch.query_start_loc[s : s + 2])
        table = batch.block_tables[batch.block_table_start[s] : batch.block_table_start[s + 1]]
        positions = batch.positions[rows.start : rows.stop].tolist()
        assert positions == list(range(batch.seq_lens[s] - len(rows), batch.seq_lens[s])) != [], "positions have a gap"
        assert len(table) == -(-batch.seq_lens[s] // size), "a table is longer or shorter than its sequence"
        assert batch.slot_mapping[rows.start : rows.stop].tolist() == [table[p // size] * size + p % size for p in positions]


class FlakyRunner(ToyRunner):
    """A toy that checks its batches, and can fail once: before anything has been written, or after all has."""

    fails: str | None = None

    def run(self, batch: ForwardBatch) -> RunnerOutput:
        check_batch(batch, len(self.pool) // self.block_size)
        fails, self.fails = self.fails, None
        if fails == "early":
            raise RunnerFailed
        output = super().run(batch)
        if fails == "late":
            raise RunnerFailed
        return output._replace(prompt_logprobs=[{token_id: Logprob(-1.0, 1)} for token_id in batch.prompt_targets])


class FlakyStep(ToyStep):
    """A step that fails when somebody waits for it: before or after it has been computed, or with all that was in the queue."""

    device: FlakyDevice

    def result(self) -> RunnerOutput:
        fails, self.device.fails = self.device.fails, None
        if fails == "lost":
            self.device.queue.clear()
        if fails != "early" and fails != "lost":
            output = super().result()
        if fails:
            raise RunnerFailed
        return output._replace(prompt_logprobs=[{token_id: Logprob(-1.0, 1)} for token_id in self.batch.prompt_targets])


class FlakyDevice(ToyDevice):
    """A toy with a queue that checks its batches, works through them early or late, and can fail once: at the next call, "early"
    at the latest when somebody waits, "late" or "lost" not before.
    """

    fails: str | None = None
    num_submitted = 0
    longest_queue = 0

    def submit(self, batch: ForwardBatch) -> ToyStep:
        try:
            check_batch(batch, len(self.pool) // self.block_size)
        except AssertionError as error:
            raise BadBatch(error) from error
        if self.fails == "early":
            self.fails = None
            raise RunnerFailed
        self.queue.append(step := FlakyStep(batch, self.work))
        step.device = self
        self.num_submitted += 1
        self.longest_queue = max(self.longest_queue, len(self.queue))
        while self.queue and self.num_submitted * 5 % 7 < 2:  # now and then it is quick
            self.work()
        return step


def greedy(max_tokens: int = 16, **others: object) -> SamplingParams:
    """Greedy sampling."""
    return SamplingParams(temperature=0, max_tokens=max_tokens, **others)


def make_engine(num_blocks: int, block_size: int, vocab_size: int = VOCAB_SIZE, **limits: object) -> Engine:
    """An engine over a toy that can be made to fail."""
    return build_engine(FlakyRunner(num_blocks, block_size, vocab_size), num_blocks, block_size, eviction_policy="reuse-bonus", **limits)


def make_ahead_engine(num_blocks: int, block_size: int, vocab_size: int = VOCAB_SIZE, **limits: object) -> AheadEngine:
    """An engine that plans ahead, over a toy that can be made to fail."""
    return build_ahead_engine(FlakyDevice(num_blocks, block_size, vocab_size), num_blocks, block_size, **limits)


def record(engine: Engine) -> list:
    """The list that the engine's events go to from now on."""
    log: list = []
    engine.scheduler.events.subscribe(log.append)
    return log


class Oracle:
    """Knows without a pool what every sequence has to say, and which prefixes it may have found in the cache."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.begins: dict[int, list[int]] = {}  # the tokens each sequence began with: its prompt, or its parent's tokens
        self.seen: dict[object, list[Sequence]] = {}  # every sequence there has been, by namespace

    def began(self, seq_id: int) -> None:
        """Remember a new sequence, and those that will split off it."""
        first = self.engine.sequences[seq_id]
        for seq in (first, *first.forks):
            self.begins[seq.seq_id] = seq.token_ids.tolist()
            self.seen.setdefault(namespace_of(seq), []).append(seq)

    def expected(self, seq: Sequence) -> list[int]:
        """All tokens of a finished sequence, prompt included."""
        tokens, params, limit = list(self.begins[seq.seq_id]), seq.params, self.engine.scheduler.max_model_len
        answer = toy_reference(tokens, limit - len(tokens), self.engine.runner.vocab_size, seq.seed, params)
        for token_id in answer:
            tokens.append(token_id)
            num_output_tokens = len(tokens) - seq.num_prompt_tokens
            if token_id in (params.stop_token_ids or ()) or num_output_tokens >= params.max_tokens:
                break
        return tokens

    def check(self, moved: Iterable[Sequence]) -> None:
        """Compare the finished sequences among those that moved."""
        for seq in moved:
            if seq.status is SequenceStatus.FINISHED and seq.finish_reason != "abort":
                expected = self.expected(seq)
                assert seq.token_ids.tolist() == expected, f"sequence {seq.seq_id}: {seq.token_ids.tolist()} is not {expected}"
                stopped = expected[-1] in (seq.params.stop_token_ids or ())
                assert seq.finish_reason == ("stop" if stopped else "length")
                self.check_hit(seq)
                if seq.params.prompt_logprobs is not None:
                    rated = [token_id for each in seq.prompt_logprobs for token_id in each]
                    assert rated == seq.token_ids[1 : seq.num_prompt_tokens].tolist(), "a token of the prompt was not rated, or twice"

    def check_hit(self, seq: Sequence) -> None:
        """A hit must be explained by another sequence of the same namespace, and must leave the last token to compute."""
        assert seq.num_cached_tokens < len(self.begins[seq.seq_id]), "the whole prompt was taken from the cache"
        others = (other for other in self.seen[namespace_of(seq)] if other is not seq)
        longest = max((num_common(seq.token_ids, other.token_ids) for other in others), default=0)
        assert seq.num_cached_tokens <= longest, f"a hit of {seq.num_cached_tokens} tokens, but at most {longest} were ever computed"


def num_common(a: Iterable[int], b: Iterable[int]) -> int:
    """How many leading tokens are the same."""
    count = 0
    for x, y in zip(a, b):  # noqa: B905 (they may differ in length)
        if x != y:
            break
        count += 1
    return count


def check_whole(engine: Engine) -> None:
    """Nothing is left to do: the pool is whole, and after clearing the cache the allocator is, too."""
    scheduler, cache = engine.scheduler, engine.scheduler.cache
    assert not engine.sequences and not scheduler.running and not scheduler.waiting and not scheduler.scheduled
    assert cache.num_free == cache.num_blocks, "blocks are missing from the pool"
    cache.clear()
    assert cache.allocator.num_free == cache.num_blocks and not cache.roots and not cache.nodes
    engine.check_invariants()


def drain(engine: Engine, oracle: Oracle, max_steps: int = 5000) -> None:
    """Step until nothing is left to do, checking all the way."""
    for _ in range(max_steps):
        if not engine.sequences:
            return
        oracle.check(engine.step())
        engine.check_invariants()
    raise AssertionError(f"not done after {max_steps} steps: a livelock")


def random_prompt(rng: random.Random, max_len: int = 20) -> list[int]:
    """Few different tokens and repeated beginnings, so that prefixes are often shared."""
    start = [[], [0, 1] * 4, [1] * 6][rng.randrange(3)]
    return (start + [rng.randrange(2) for _ in range(rng.randint(1, max_len))])[:max_len]


def random_params(rng: random.Random) -> SamplingParams:
    """Greedy or seeded, two salts, three priorities, now and then a stop token."""
    return SamplingParams(
        temperature=rng.choice([0, 0, 1]), max_tokens=rng.randint(1, 12), cache_salt=rng.choice([None, None, "a"]),
        priority=rng.choice([0, 0, 0, 1, -1]), stop_token_ids=rng.choice([None, None, [3]]), seed=rng.choice([None, 5]),
        n=rng.choice([1, 1, 1, 2, 3]), prompt_logprobs=rng.choice([None, None, None, 0]),
    )


def random_engine(rng: random.Random, make: Callable[..., Engine] = make_engine) -> Engine:
    """Tiny pools, so that preemption is the rule."""
    block_size = rng.choice([1, 2, 3, 4, 16])
    return make(
        rng.randint(max(2, 24 // block_size), 60 // block_size + 4), block_size, max_num_batched_tokens=rng.choice([1, 3, 7, 64]),
        max_num_seqs=rng.choice([1, 2, 8]), enable_prefix_caching=rng.random() < 0.8,
    )


def random_life(rng: random.Random, num_moves: int = 60, make: Callable[..., Engine] = make_engine) -> None:
    """One engine from its first request to an empty pool; raises where anything is wrong."""
    engine = random_engine(rng, make)
    oracle = Oracle(engine)
    for _ in range(num_moves):
        random_move(rng, engine, oracle)
        engine.check_invariants()
    drain(engine, oracle)
    check_whole(engine)


def random_move(rng: random.Random, engine: Engine, oracle: Oracle) -> None:
    """Add, abort, fork, fail or step."""
    dice = rng.random()
    if dice < 0.3:
        try:
            oracle.began(engine.add_request(random_prompt(rng), random_params(rng)))
        except RequestTooLong:
            pass
    elif dice < 0.35 and engine.sequences:
        engine.abort(rng.choice(list(engine.sequences)))
    elif dice < 0.45 and engine.sequences:
        oracle.began(engine.fork(rng.choice(list(engine.sequences))))
    elif dice < 0.48 and engine.sequences:
        oracle.check(fail_once(engine, rng.choice(["early", "late", "lost"][: 3 if isinstance(engine, AheadEngine) else 2])))
    else:
        oracle.check(engine.step())


def fail_once(engine: Engine, when: str) -> list[Sequence]:
    """A step in which the runner raises: nothing moves, and nobody hears of it. While suspects are tried, a step like any other."""
    if engine.suspects:
        return engine.step()
    engine.runner.fails = when
    moved = engine.step()
    assert moved == [] and engine.runner.fails is None, "the runner did not fail"
    return moved
