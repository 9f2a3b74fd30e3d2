"""Whatever happens to an engine, in whatever order: every text is right, no block is lost, and nothing waits for ever."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from toy_world import VOCAB_SIZE, Oracle, check_whole, drain, fail_once, make_engine

from pagedlit.serving.sequence import InvalidRequest, RequestTooLong, SamplingParams

tokens = st.integers(0, VOCAB_SIZE - 1)
prompts = st.one_of(  # shared beginnings, repeated tokens, anything
    st.builds(lambda start, end: start + end, st.sampled_from([[0, 1, 2, 3] * 3, [1] * 7, [0, 1, 2, 3, 3]]), st.lists(tokens, max_size=4)),
    st.builds(lambda token_id, num_tokens: [token_id] * num_tokens, tokens, st.integers(1, 20)),
    st.lists(tokens, min_size=1, max_size=24),
)
params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0, 0, 1]),
    max_tokens=st.integers(1, 14),
    seed=st.sampled_from([None, None, 0, 7]),
    cache_salt=st.sampled_from([None, None, "tenant"]),
    priority=st.integers(-1, 1),
    stop_token_ids=st.sampled_from([None, None, [2]]),
)


class EngineMachine(RuleBasedStateMachine):
    """Adds, steps, aborts, forks, fails and forgets, on an engine of any shape."""

    make = staticmethod(make_engine)

    @initialize(
        block_size=st.integers(1, 16), num_tokens=st.integers(20, 90), budget=st.integers(1, 64), num_seqs=st.integers(1, 8), caching=st.booleans(),
        seed=st.integers(0, 3),
    )
    def start(self, block_size: int, num_tokens: int, budget: int, num_seqs: int, caching: bool, seed: int) -> None:
        self.engine = self.make(
            -(-num_tokens // block_size), block_size, max_num_batched_tokens=budget, max_num_seqs=num_seqs, enable_prefix_caching=caching, seed=seed
        )
        self.oracle = Oracle(self.engine)

    def pick(self, index: int) -> int:
        return sorted(self.engine.sequences)[index % len(self.engine.sequences)]

    @rule(prompt=prompts, params=params)
    def add(self, prompt: list[int], params: SamplingParams) -> None:
        limit = self.engine.scheduler.max_model_len
        try:
            self.oracle.began(self.engine.add_request(prompt, params))
            assert len(prompt) < limit
        except RequestTooLong:
            assert len(prompt) >= limit

    @rule(num_steps=st.integers(1, 6))
    def step(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.oracle.check(self.engine.step())
            self.engine.check_invariants()

    @precondition(lambda self: self.engine.sequences)
    @rule(index=st.integers(0, 30))
    def abort(self, index: int) -> None:
        seq = self.engine.abort(self.pick(index))
        assert seq is not None and seq.finish_reason == "abort" and self.engine.abort(seq.seq_id) is None

    @precondition(lambda self: self.engine.sequences)
    @rule(index=st.integers(0, 30), other=st.one_of(st.none(), params))
    def fork(self, index: int, other: SamplingParams | None) -> None:
        parent = self.engine.sequences[self.pick(index)]
        try:
            self.oracle.began(self.engine.fork(parent.seq_id, other))
        except InvalidRequest:
            assert other is not None and (other.cache_salt != parent.params.cache_salt or other.max_tokens <= parent.num_output_tokens)

    @precondition(lambda self: self.engine.sequences)
    @rule(when=st.sampled_from(["early", "late"]))
    def fail(self, when: str) -> None:
        self.oracle.check(fail_once(self.engine, when))

    @rule(new_weights=st.booleans())
    def forget(self, new_weights: bool) -> None:
        self.engine.scheduler.cache.clear(new_weights)

    @invariant()
    def all_blocks_are_accounted_for(self) -> None:
        if hasattr(self, "engine"):
            self.engine.check_invariants()

    def teardown(self) -> None:
        if hasattr(self, "engine"):
            drain(self.engine, self.oracle)
            check_whole(self.engine)


TestEngine = EngineMachine.TestCase
TestEngine.settings = settings(
    max_examples=300, stateful_step_count=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
