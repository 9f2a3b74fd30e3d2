"""Static batches and recorded steps on a CPU: padding that touches nothing, recordings that follow memory, and an engine that cannot tell."""

import random
from array import array
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from test_attention import make_step
from test_parity import generate_one_by_one, random_model, serve, shipped_model, some_prompts

from pagedlit.compute.attention import AttentionMetadata, forward_context, get_backend, paged_attention, paged_attention_reference
from pagedlit.compute.graphs import CudaGraphs, StaticDecoder, Tape, decode_in_fixed_shape, eagerly, forward_of, on_tape, record_all, wanted_rows
from pagedlit.compute.startup import recorded_steps
from pagedlit.compute.static_batch import Fields, StaticBatch, num_bytes, padded_sizes
from pagedlit.llm import LLM
from pagedlit.serving.scheduler import ForwardBatch
from pagedlit.serving.sequence import SamplingParams

GARBAGE = 0x55  # of every byte: no block, slot or length is that large


def decodes(lengths, block_size=4, seed=0):
    """A step of decodes whose blocks are scattered over a pool of 64."""
    rng = random.Random(seed)
    blocks, batch = rng.sample(range(64), 64), ForwardBatch(block_size)
    for length in lengths:
        table = [blocks.pop() for _ in range(-(-length // block_size))]
        batch.token_ids.append(rng.randrange(3, 90))
        batch.positions.append(length - 1)
        batch.slot_mapping.append(table[-1] * block_size + (length - 1) % block_size)
        batch.query_start_loc.append(len(batch.token_ids))
        batch.seq_lens.append(length)
        batch.block_tables.extend(table)
        batch.block_table_start.append(len(batch.block_tables))
        batch.logits_rows.append(len(batch.token_ids) - 1)
    return batch


def poison(static):
    for buffer in (static.buffer, *(host.buffer for host in static.hosts)):
        buffer.fill_(GARBAGE)


@pytest.mark.parametrize("largest", [1, 2, 3, 4, 7, 8, 9, 64, 65, 256, 1000, 5000])
def test_padded_sizes_end_with_the_largest_and_waste_little(largest):
    sizes = padded_sizes(largest)
    assert sizes == sorted(set(sizes)) and sizes[-1] == largest and sizes[0] == 1
    assert all(b - a <= max(8, 2 * a**0.5) for a, b in zip(sizes, sizes[1:]))


def test_fields_do_not_overlap_and_fill_the_buffer():
    for n, num_block_ids in ((1, 0), (3, 7), (256, 1000)):
        buffer = torch.zeros(num_bytes(n, num_block_ids), dtype=torch.uint8)
        fields = Fields.of(buffer, n)
        for field in fields:
            assert not field.any(), "nobody has written here"
            field.fill_(-1)
        assert buffer.eq(255).all() and len(fields.block_tables) == num_block_ids


@pytest.mark.parametrize("lengths", [[1], [5, 3], [9, 1, 17], [4] * 8, [1, 2, 3, 4, 5, 6, 7, 8, 9]])
def test_a_filled_batch_says_what_the_batch_says_and_padding_says_nothing(lengths):
    batch, static = decodes(lengths), StaticBatch(16, 64, 4, max_seq_len=64)
    poison(static)
    size, n, want = static.fill(batch), len(lengths), AttentionMetadata.from_batch(batch)
    got = static.steps[size]
    assert size == next(s for s in padded_sizes(16) if s >= n) and got.num_seqs == size
    for name in ("slot_mapping", "seq_lens"):
        assert getattr(got, name)[:n].tolist() == getattr(want, name).tolist()
    assert static.fields.token_ids[:size].tolist() == [*batch.token_ids, *[0] * (size - n)]
    assert static.fields.positions[:size].tolist() == [*batch.positions, *[0] * (size - n)]
    assert got.slot_mapping[n:].tolist() == [-1] * (size - n) and got.seq_lens[n:].tolist() == [0] * (size - n)
    assert got.query_start_loc.tolist() == [*batch.query_start_loc, *[n] * (size - n)]
    assert got.block_table_start.tolist() == [*batch.block_table_start, *[len(batch.block_tables)] * (size - n)]
    assert got.block_tables[: len(batch.block_tables)].tolist() == list(batch.block_tables)
    assert got.max_query_len == 1 and got.max_seq_len >= max(batch.seq_lens)


def test_the_copy_ends_where_the_block_ids_end():
    static = StaticBatch(4, 64, 4, max_seq_len=64)
    poison(static)
    static.fill(decodes([5]))
    assert static.fields.block_tables[2:].view(torch.uint8).eq(GARBAGE).all()


def test_only_steps_of_decodes_that_fit_are_taken():
    static = StaticBatch(4, 6, 4, max_seq_len=64)
    assert static.takes(decodes([4])) and static.takes(decodes([8, 8, 4, 4])) and not static.takes(ForwardBatch(4))
    assert not static.takes(decodes([1] * 5)), "more sequences than rows"
    assert not static.takes(decodes([17, 8])), "more block ids than room"
    mixed = decodes([4, 4])
    for name in ("token_ids", "positions", "slot_mapping"):
        getattr(mixed, name).append(0)
    mixed.query_start_loc[2] = 3
    assert not static.takes(mixed), "a chunk of two rows"


def test_host_buffers_take_turns_and_wait_for_their_own_copy(monkeypatch):
    static, log = StaticBatch(4, 64, 4, max_seq_len=64), []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")

    class Event:
        def __init__(self, host):
            self.host = host

        def synchronize(self):
            log.append(("wait", self.host, static.hosts[1].fields.seq_lens[0].item() if self.host is static.hosts[1] else None))

        def record(self, stream):
            log.append(("record", self.host, stream))

    first, second = static.hosts
    for host in (first, second):
        host.copied = Event(host)
    for length in (3, 4, 5):
        static.fill(decodes([length]))
    assert [(what, host is first) for what, host, _ in log] == [(w, h) for h in (True, False, True) for w in ("wait", "record")]
    assert log[1][2] == "stream of cpu", "the stream of the copy, whichever device is the current one"
    assert log[4][2] == 3, "what was sent two steps ago is still there when its copy is waited for"
    assert first.fields.seq_lens[0] == 5 and second.fields.seq_lens[0] == 4


@pytest.mark.parametrize("options", [{}, {"sliding_window": 5}, {"softcap": 2.0, "sinks": torch.linspace(-1, 2, 4)}], ids=["plain", "window", "all"])
@pytest.mark.parametrize("backend", ["cpu", "reference", "fixed"])
def test_padding_changes_nothing_in_attention(backend, options):
    attend = decode_in_fixed_shape if backend == "fixed" else get_backend(backend)
    cache, static = torch.full((64, 2, 2, 4, 8), torch.nan), StaticBatch(16, 64, 4, max_seq_len=32)
    for lengths in ([3, 9, 1], [16, 1, 2, 7, 5], [4]):
        batch = decodes(lengths, seed=len(lengths))
        generator = torch.Generator().manual_seed(len(lengths))
        start = cache.clone()
        for s, length in enumerate(lengths):  # only slots in use hold numbers
            blocks = batch.block_tables[batch.block_table_start[s] : batch.block_table_start[s + 1]]
            for position in range(length):
                start[blocks[position // 4], :, :, position % 4] = torch.randn(2, 2, 8, generator=generator)
        poison(static)
        size = static.fill(batch)
        rows = [torch.randn(size, heads, 8, generator=generator) for heads in (4, 2, 2)]
        want_cache, got_cache = start.clone(), start.clone()
        want = paged_attention_reference(*(x[: len(lengths)] for x in rows), [want_cache], AttentionMetadata.from_batch(batch), 0.35, **options)
        static.steps[size].plans.clear()
        got = attend(*rows, [got_cache], static.steps[size], 0.35, **options)
        torch.testing.assert_close(got[: len(lengths)], want, atol=1e-5, rtol=1e-4)
        assert not got[len(lengths) :].any() and torch.equal(got_cache.nan_to_num(), want_cache.nan_to_num())


def test_padding_alone_touches_nothing():
    static, cache = StaticBatch(4, 64, 4, max_seq_len=32), torch.full((8, 2, 2, 4, 8), torch.nan)
    for attend in (get_backend("cpu"), paged_attention_reference, decode_in_fixed_shape):
        static.steps[4].plans.clear()
        out = attend(*(torch.randn(4, heads, 8) for heads in (4, 2, 2)), [cache], static.steps[4], 0.35)
        assert not out.any() and cache.isnan().all()


def test_fixed_shape_attention_takes_values_of_another_width():
    step = make_step([(3, 1), (9, 1), (0, 1)], 4, (4, 2), (16, 8))
    got = decode_in_fixed_shape(step.query, step.key, step.value, step.kv_cache, step.metadata, 0.3)
    torch.testing.assert_close(got.double(), step.expected(0.3), atol=1e-5, rtol=1e-4)


def test_a_tape_follows_memory_and_nothing_else():
    x, out, factor = torch.ones(3), torch.zeros(3), [2.0]

    def step():
        y = x.clone().view(3)
        y.add_(1)
        out.copy_(y * factor[0])

    replay = on_tape(step)
    x.fill_(4)
    factor[0] = 100.0
    replay()
    assert out.tolist() == [10, 10, 10]
    replay()
    assert out.tolist() == [10, 10, 10], "what is changed in place begins afresh"


def put_where(x):
    x[x > 0] = torch.ones(3)


READS = [torch.equal, lambda x, y: x[0].item(), lambda x, y: bool(x[0] > 0), lambda x, y: x.nonzero(), lambda x, y: x[y > 0], lambda x, y: put_where(x)]


@pytest.mark.parametrize("read", READS)
def test_a_tape_refuses_numbers_for_the_host(read):
    for mode in (nullcontext(), torch.inference_mode()):
        x = torch.arange(1.0, 4)
        with mode, pytest.raises(RuntimeError, match="recording cannot hold"), Tape():
            read(x, x)


def test_a_tape_takes_masks_that_pick_no_rows():
    x, places = torch.arange(4.0), torch.tensor([2, 0])
    with Tape() as tape:
        x[x > 2] = 0.0
        out = torch.where(x > 1, x, 7.0)[places]
    x.copy_(torch.tensor([5.0, 1.0, 2.0, 9.0]))
    tape.replay()
    assert out.tolist() == [2.0, 7.0] and x.tolist() == [0.0, 1.0, 2.0, 0.0]


def test_a_tape_looks_into_the_attention_op():
    static = StaticBatch(4, 64, 4, max_seq_len=32)
    rows, cache = [torch.randn(2, heads, 8) for heads in (4, 2, 2)], torch.randn(64, 2, 2, 4, 8)
    with forward_context(static.steps[2], decode_in_fixed_shape), Tape() as tape:
        out = paged_attention(*rows, [cache], 0.35)
    assert torch.ops.pagedlit.paged_attention.default not in [func for func, *_ in tape.operations]
    batch = decodes([7, 12])
    static.fill(batch)
    want = paged_attention_reference(*rows, [cache.clone()], AttentionMetadata.from_batch(batch), 0.35)
    tape.replay()  # outside the context
    torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-4)


def test_rows_in_their_order_are_a_view():
    logits, batch = torch.randn(8, 5), decodes([3, 4, 5])
    assert wanted_rows(logits, batch).data_ptr() == logits.data_ptr() and len(wanted_rows(logits, batch)) == 3
    batch.prompt_rows = array("i", [1])
    assert torch.equal(wanted_rows(logits, batch), logits[[0, 1, 2, 1]])
    batch.prompt_rows, batch.logits_rows = array("i"), array("i", [2, 2, 0])
    assert torch.equal(wanted_rows(logits, batch), logits[[2, 2, 0]])
    batch.logits_rows = array("i")
    assert wanted_rows(logits, batch).shape == (0, 5)


class PoisonedDecoder:
    """A decoder in whose buffers nothing survives from step to step."""

    def __init__(self, decoder):
        self.decoder, self.num_declined = decoder, 0

    def takes(self, batch):
        taken = self.decoder.takes(batch)
        self.num_declined += not taken
        return taken

    def __call__(self, batch, sampled):
        poison(self.decoder.static)
        self.decoder.logits.fill_(torch.nan)
        return self.decoder(batch, sampled)


def record_steps(llm, record, max_num_seqs):
    """Let an engine's decode steps run over static buffers, poisoned in between."""
    runner, backend = llm.runner, llm.runner.backend
    if record is on_tape:
        runner.backend = decode_in_fixed_shape
    runner.shortcut = PoisonedDecoder(recorded_steps(runner, max_num_seqs, record))
    runner.backend = backend
    return runner.shortcut


@pytest.fixture(scope="module", params=["shipped", "gpt_oss"])
def case(request):
    model = shipped_model() if request.param == "shipped" else random_model(request.param)
    prompts = some_prompts(model.config.vocab_size)
    return model, prompts, generate_one_by_one(model, prompts)


@pytest.mark.parametrize("record", [eagerly, on_tape])
def test_engine_equals_generate_over_poisoned_static_buffers(case, record):
    """Chunked prefill, mixed steps, preemption, forks, prefix hits and copies inside a block, and decode steps from recordings."""
    model, prompts, want = case
    llm = LLM(model, block_size=3, num_blocks=50, max_num_batched_tokens=24, max_model_len=128)
    shortcut = record_steps(llm, record, max_num_seqs=12)
    assert serve(llm, prompts) == want
    assert llm.stats().num_preemptions and shortcut.num_declined, "the pool is meant to be too small, and some steps to be mixed"
    assert serve(llm, prompts) == want
    assert llm.stats().num_copies and llm.stats().num_cached_tokens
    assert len(shortcut.decoder.num_replays) >= 3, "steps of several sizes"


def test_a_step_of_more_sequences_than_were_recorded_runs_eagerly(case):
    model, prompts, want = case
    llm = LLM(model, num_blocks=128)
    shortcut = record_steps(llm, eagerly, max_num_seqs=2)
    assert serve(llm, prompts) == want
    assert shortcut.num_declined > 10
    assert serve(llm, prompts[:2]) == want[:2] and set(shortcut.decoder.num_replays) <= {1, 2}


def test_logprobs_and_repeated_rows_come_from_the_right_rows():
    model = shipped_model()
    params = [SamplingParams(temperature=0, max_tokens=6, n=1 + (i == 1), logprobs=2, prompt_logprobs=1) for i in range(3)]
    prompts, answers = [[5], [9], [40, 41, 42]], []  # prompts of one token are steps like decodes
    for record in (None, eagerly, on_tape):
        llm = LLM(model, num_blocks=64, max_model_len=64)
        if record:
            record_steps(llm, record, max_num_seqs=8)
        outputs = [llm.generate(prompt, p, use_tqdm=False)[0] for prompt, p in zip(prompts, params)]
        answers.append([(o.prompt_logprobs, [(a.token_ids, a.logprobs) for a in o.outputs]) for o in outputs])
    rated = [[list(flat(answer)) for answer in each] for each in answers]
    assert [len(x) for x in rated[0]] == [len(x) for x in rated[1]] == [len(x) for x in rated[2]]
    for other in rated[1:]:
        for a, b in zip(rated[0], other):
            assert a == pytest.approx(b, abs=1e-4)


def flat(x):
    """All numbers in a nested answer."""
    if isinstance(x, dict):
        for token_id, each in x.items():
            yield from (token_id, each.logprob, each.rank)
    elif isinstance(x, (list, tuple)):
        for each in x:
            yield from flat(each)
    elif x is not None:
        yield x


def test_sizes_are_recorded_largest_first_and_nothing_is_taken_before_all_are():
    recorded, llm = [], LLM(shipped_model(), num_blocks=16)

    def record(step):
        recorded.append(step.args[0])
        return eagerly(step)

    decoder = StaticDecoder(forward_of(llm.runner, llm.runner.layers), StaticBatch(16, 64, 16, max_seq_len=64), record)
    assert recorded == [16] and not decoder.takes(decodes([3], 16))
    record_all(decoder)
    assert recorded == [16, 8, 4, 2, 1] and decoder.takes(decodes([3], 16))
    assert decoder.logits.shape == (16, llm.runner.vocab_size) and not decoder.logits.is_inference()


def test_cuda_graphs_warm_up_aside_and_share_a_pool(monkeypatch):
    """The order of calls, with a fake in the place of torch.cuda."""
    log = []

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            log.append(f"{self.name} waits for {other.name}")

    @contextmanager
    def entered(name):
        log.append(f"begin {name}")
        yield
        log.append(f"end {name}")

    class Graph:
        def replay(self):
            log.append("replay")

    names = iter(["side", "another"])
    fakes = {
        "graph_pool_handle": lambda: "pool", "Stream": lambda device: Stream(next(names)), "current_stream": lambda device: Stream("main"),
        "synchronize": lambda device: log.append("synchronize"), "stream": lambda stream: entered(stream.name), "CUDAGraph": Graph,
        "graph": lambda graph, pool, stream, capture_error_mode: entered(f"{pool} {stream.name} {capture_error_mode}"),
    }  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    record = CudaGraphs(torch.device("cuda"))
    record(lambda: log.append("step"))()
    before = ["side waits for main", "begin side", "step", "step", "end side", "main waits for side", "synchronize"]
    once = [*before, "begin main", "begin pool side thread_local", "step", "end pool side thread_local", "end main", "replay"]
    record(lambda: log.append("step"))()
    assert log == once * 2, "one stream for all recordings: each brings a workspace of cuBLAS along, which stays"


def test_a_capture_that_fails_says_what_broke_it_and_is_over(monkeypatch):
    ended = []

    @contextmanager
    def capture(*args, **kwargs):
        try:
            yield
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    def waits():
        if record.is_capturing:
            raise RuntimeError("operation not permitted when stream is capturing")

    idle = SimpleNamespace(wait_stream=lambda other: None)
    fakes = {
        "graph_pool_handle": lambda: "pool", "Stream": lambda device: idle, "current_stream": lambda device: idle, "CUDAGraph": lambda: None,
        "synchronize": lambda device: setattr(record, "is_capturing", True), "stream": lambda stream: nullcontext(), "graph": capture,
    }  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *args: ended.append(args))
    record = CudaGraphs(torch.device("cuda", 1))
    record.is_capturing = False
    with pytest.raises(RuntimeError, match="not permitted"):
        record(waits)
    assert ended == [(1, "pool")]
