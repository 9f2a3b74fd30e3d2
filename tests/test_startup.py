"""Compiled layers and the start of a runner, on a CPU: one graph for all layers, measured memory, and failures that cost speed alone."""

import warnings
from functools import partial

import pytest
import torch
from test_attention import make_step
from test_parity import CONFIGS, generate_one_by_one, random_model, serve, some_prompts
from torch import nn
from transformers import AutoModelForCausalLM

from pagedlit import llm as llm_module
from pagedlit.compute import startup as startup_module
from pagedlit.compute.attention import forward_context, get_backend, paged_attention
from pagedlit.compute.compiled_layers import CompiledLayers, repeated_layers
from pagedlit.compute.graphs import CudaGraphs, eagerly
from pagedlit.compute.kv_cache import DeviceMemory, NoRoomForCache, bytes_per_block, gpu_blocks
from pagedlit.compute.model_runner import ModelRunner, step_logits
from pagedlit.compute.startup import CudaMeter, Startup, largest_step, recorder, recording_bytes, small_layers, spread, static_batch, step_bytes, unlike
from pagedlit.llm import LLM


class Counting:
    """A backend of torch.compile that compiles nothing and counts graphs."""

    def __init__(self):
        self.num_graphs = 0

    def __call__(self, graph, inputs):
        self.num_graphs += 1
        return graph.forward


class Readings:
    """A meter with a list of answers, that runs what it is asked to measure."""

    def __init__(self, *free, total=100_000, peak=700):
        self.free, self.total, self.bytes, self.results = list(free), total, peak, []

    def peak(self, call):
        self.results.append(call())
        return self.bytes

    def now(self):
        return DeviceMemory(self.free.pop(0), self.total)


def parts(runner):
    return [call.module for call in runner.calls]


def logits_of(runner, num_tokens):
    batch = largest_step(num_tokens, 3, num_tokens, runner.block_size)
    return step_logits(runner, small_layers(runner, batch, unlike(runner)[5]), batch)


def models(name, *num_layers):
    torch.manual_seed(0)
    for n in num_layers:
        config = CONFIGS[name]()
        config.num_hidden_layers = n
        kinds = ("sliding_attention", "full_attention") if name.startswith("gemma") else ("full_attention",)
        config.layer_types = [kinds[i % len(kinds)] for i in range(n)]
        yield AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def runner():
    return ModelRunner(random_model("qwen3"), block_size=4, num_blocks=16)


def test_number_of_graphs_does_not_depend_on_the_number_of_layers():
    counts = []
    for model in models("gemma3", 2, 4):  # half of them with a window
        runner, backend = ModelRunner(model, block_size=4, num_blocks=16), Counting()
        switch = CompiledLayers(model, parts(runner), backend, fullgraph=True)
        for num_tokens in (7, 1, 12):
            runner.compiled = None
            want = logits_of(runner, num_tokens)
            runner.compiled = switch
            torch.testing.assert_close(logits_of(runner, num_tokens), want, atol=1e-4, rtol=1e-4)
        counts.append(backend.num_graphs)
    assert counts == [4, 4], "one graph for a single row, one for all other numbers of rows, for each of two kinds of layers"


def test_the_whole_model_compiles_as_one_graph():
    [model] = models("gemma2", 2)
    runner, backend = ModelRunner(model, block_size=4, num_blocks=16), Counting()

    class Whole(CompiledLayers):
        def __init__(self):
            self.forwards = {model: torch.compile(model.forward, fullgraph=True, dynamic=True, backend=backend)}

    want = logits_of(runner, 9)
    runner.compiled = Whole()
    torch.testing.assert_close(logits_of(runner, 9), want, atol=1e-5, rtol=1e-4)
    assert backend.num_graphs == 1


def test_inductor_writes_into_the_pool_and_not_into_a_copy():
    """Without other operations there is nothing that it would need a C++ compiler for."""
    step, inner, seen = make_step([(3, 1), (9, 1), (0, 5)], 4, (4, 2), (8, 8)), get_backend("cpu"), []

    def spy(query, key, value, kv_cache, *rest):
        seen.extend(part.data_ptr() for part in kv_cache)
        return inner(query, key, value, kv_cache, *rest)

    compiled = torch.compile(lambda *rows: paged_attention(*rows, 0.3), fullgraph=True, dynamic=True)
    with torch.inference_mode(), forward_context(step.metadata, spy):
        out = compiled(step.query, step.key, step.value, step.kv_cache)
    torch.testing.assert_close(out.double(), step.expected(0.3), atol=1e-5, rtol=1e-4)
    assert seen == [part.data_ptr() for part in step.kv_cache]


def test_layers_are_as_they_were_and_hooks_run(runner):
    layers = repeated_layers(runner.model, parts(runner))
    assert layers == list(runner.model.model.layers)
    calls, own = [], layers[1].forward
    hook = layers[0].register_forward_hook(lambda *args: calls.append("hook"))
    layers[1].__dict__["forward"] = lambda *args, **kwargs: calls.append("own") or own(*args, **kwargs)
    switch, before = CompiledLayers(runner.model, parts(runner), Counting()), dict(layers[1].__dict__)
    try:
        want = logits_of(runner, 6)
        runner.compiled = switch
        torch.testing.assert_close(logits_of(runner, 6), want, atol=1e-5, rtol=1e-4)
        with pytest.raises(KeyError), switch.on():
            assert "forward" in layers[0].__dict__
            raise KeyError
        assert calls == ["hook", "own"] * 2 and "forward" not in layers[0].__dict__ and layers[1].__dict__ == before
    finally:
        runner.compiled = None
        hook.remove()
        del layers[1].__dict__["forward"]


def test_repeated_layers_are_the_innermost_members():
    attention = [nn.Identity() for _ in range(3)]
    stages = nn.ModuleList([nn.ModuleList([nn.Sequential(a) for a in attention[:2]]), nn.ModuleList([nn.Sequential(attention[2])])])
    model = nn.ModuleDict({"stages": stages, "experts": nn.ModuleList([nn.Identity()])})
    assert repeated_layers(model, attention) == [*stages[0], *stages[1]]
    assert repeated_layers(model, []) == []


@pytest.mark.parametrize("sizes", [(10, 3, 4), (2, 8, 99), (9, 2, 3), (2048, 256, 10**6), (1, 1, 1), (7, 7, 1)])
def test_the_largest_step_uses_up_its_budgets(sizes):
    num_tokens, max_num_seqs, max_len = sizes
    lengths = spread(*sizes)
    batch = largest_step(*sizes, 4)
    assert sum(lengths) == len(batch.token_ids) == min(num_tokens, max_num_seqs * max_len)
    assert len(lengths) == len(batch.logits_rows) == len(batch.sampling) == min(num_tokens, max_num_seqs)
    assert max(lengths) <= max_len and min(lengths) >= 1
    assert [batch.token_ids[row] for row in batch.logits_rows] == [0] * len(lengths)
    assert batch.query_start_loc[-1] == len(batch.token_ids) and batch.block_table_start[-1] == len(batch.block_tables)


def test_the_pool_gets_what_the_measured_step_and_recordings_leave(runner):
    meter = Readings(60_000, 55_000, 54_970, peak=1_234)
    startup = Startup(32, 16, record=eagerly, meter=meter)
    reserved = startup.reserve(runner)
    assert reserved == 1_234 + 5_000 + 30 * 5 - 30, "sizes 1, 2, 4, 8, 16: the first, and four more"
    assert [len(result) for result in meter.results] == [16], "a sampled row for each sequence"
    block_bytes = bytes_per_block([call.spec for call in runner.calls], 4, torch.float32)
    blocks = gpu_blocks(block_bytes, DeviceMemory(60_000, 100_000), 0.9, reserved)
    assert blocks == (90_000 - 40_000 - reserved) // block_bytes
    assert Startup(32, 16, enforce_eager=True, record=eagerly, meter=Readings(peak=99)).reserve(runner) == 99
    assert Startup(32, 16, meter=Readings(peak=98)).reserve(runner) == 98 and Startup(32, 16, record=eagerly).reserve(runner) == 0
    assert recording_bytes(runner, Readings(9, 50), 1, eagerly) == 0, "somebody else has freed memory"


def test_compiled_for_what_is_to_come():
    """Neither other numbers of rows nor another pool have layers compiled again, whatever sizes are equal by accident."""
    torch.compiler.reset()  # the compiler remembers which sizes of a function have varied
    config = CONFIGS["llama"]()
    config.num_hidden_layers, config.num_key_value_heads = 1, 4
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    backend, runner = Counting(), ModelRunner(model, block_size=16, num_blocks=16)
    runner.compiled = startup_module.compiled_layers(runner, backend)
    num_graphs = backend.num_graphs
    for num_tokens, num_blocks in ((2, 2), (4, 16), (16, 16), (3, 3), (1, 2), (1, 40), (40, 40), (64, 5)):
        batch = largest_step(num_tokens, 3, num_tokens, 16)
        step_logits(runner, small_layers(runner, batch, num_blocks), batch)
    assert num_graphs == backend.num_graphs == 2


def test_a_runner_asks_before_it_makes_its_pool(monkeypatch):
    seen = []
    monkeypatch.setattr("pagedlit.compute.model_runner.blocks_that_fit", lambda *args: seen.append(args[-1]) or 7)
    model = random_model("qwen3")
    runner = ModelRunner(model, reserve=lambda runner: 10 * len(runner.calls))
    assert seen == [30] and runner.num_blocks == 7
    assert ModelRunner(model, num_blocks=5, reserve=lambda runner: 1 / 0).num_blocks == 5, "not asked where the size is given"


def test_a_step_that_does_not_fit_an_empty_device_is_named(runner):
    def peak(call):
        raise torch.OutOfMemoryError("CUDA out of memory")

    meter = Readings()
    meter.peak = peak
    with pytest.raises(NoRoomForCache, match="max_num_batched_tokens=4096 and max_num_seqs=8"):
        step_bytes(runner, meter, 4096, 8)


def test_static_batches_have_room_for_the_longest_sequences(runner):
    static = static_batch(runner, 8)
    assert static.max_seq_len == 256 and len(static.fields.block_tables) == 8 * 64
    assert static_batch(runner, 8, num_blocks=10).max_seq_len == 40


def test_what_fails_is_left_out_with_a_warning(runner, monkeypatch):
    def broken(*args):
        raise RuntimeError("not permitted when stream is capturing")

    for startup in (Startup(16, 4, record=broken), Startup(16, 4, compile_model=True, compile_backend=broken)):
        with pytest.warns(RuntimeWarning, match="(?s)has failed; the engine runs without it.*is capturing"):
            startup.prepare(runner)
        assert runner.shortcut is None and runner.compiled is None
    startup = Startup(16, 4, record=broken, meter=Readings(5, 4, 3))
    with pytest.warns(RuntimeWarning):
        assert startup.reserve(runner) == 700
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        startup.prepare(runner)  # does not try again
        Startup(16, 4, enforce_eager=True, record=broken, compile_model=True, compile_backend=broken).prepare(runner)
        Startup(16, 4).prepare(runner)
    assert runner.shortcut is None and runner.compiled is None
    logits_of(runner, 5)


def test_graphs_are_for_gpus_and_backends_that_can_be_recorded(runner, monkeypatch):
    class OnGpu:
        device, backend = torch.device("cuda"), type("Backend", (), {"recorded_memory": dict})()

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    assert isinstance(recorder(Startup(16, 4), OnGpu), CudaGraphs)
    assert recorder(Startup(16, 4, enforce_eager=True), OnGpu) is None and recorder(Startup(16, 4), runner) is None
    OnGpu.backend = runner.backend
    assert recorder(Startup(16, 4), OnGpu) is None
    assert recorder(Startup(16, 4, record=eagerly), runner) is eagerly


def test_layers_are_compiled_on_a_gpu_unless_told_otherwise(monkeypatch):
    class OnGpu:
        device, compiled = torch.device("cuda"), None

    calls = []
    monkeypatch.setattr(startup_module, "compiled_layers", lambda runner, backend: calls.append(backend) or backend)
    for startup, want in ((Startup(16, 4), "inductor"), (Startup(16, 4, True), None), (Startup(16, 4, compile_model=False), None)):
        OnGpu.compiled = None
        startup.compile(OnGpu)
        startup.compile(OnGpu)
        assert OnGpu.compiled == want
    assert calls == ["inductor"], "once"


def test_the_gpu_meter_reads_the_allocator(monkeypatch):
    log = []
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 450)
    for name in ("reset_peak_memory_stats", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda device, name=name: log.append(name))
    monkeypatch.setattr(DeviceMemory, "measure", classmethod(lambda cls, device: cls(1, 2)))
    meter = CudaMeter(torch.device("cuda"))
    assert meter.peak(lambda: log.append("call")) == 350 and meter.now() == (1, 2)
    assert log == ["reset_peak_memory_stats", "call", "synchronize"]


def test_llm_with_all_of_it_equals_generate(monkeypatch):
    model = random_model("llama")
    prompts = some_prompts(model.config.vocab_size)[:9]
    want, backend = generate_one_by_one(model, prompts), Counting()
    options = dict(compile_model=True, compile_backend=backend, record=eagerly)
    monkeypatch.setattr(llm_module, "Startup", partial(Startup, **options))
    llm = LLM(model, block_size=4, num_blocks=40, max_num_batched_tokens=24, max_num_seqs=6)
    num_graphs = backend.num_graphs
    assert serve(llm, prompts) == want and serve(llm, prompts) == want
    assert llm.runner.shortcut.num_replays.total() > 10 and 0 < num_graphs == backend.num_graphs, "nothing is compiled in a step"
    eager = LLM(model, num_blocks=40, enforce_eager=True)
    assert eager.runner.shortcut is eager.runner.compiled is None and backend.num_graphs == num_graphs
    assert generate_one_by_one(model, prompts[:2]) == want[:2]
