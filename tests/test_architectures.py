"""Every architecture is right or refused: parity with `model.generate` for many, the named cause for the others."""

import random
from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, LlamaConfig, LlamaForCausalLM

from pagedlit.compute.attention import visible
from pagedlit.compute.model_runner import ModelRunner, OnHost, UnsupportedModel, discover_layers, fits
from pagedlit.compute.sampler import BadLogits
from pagedlit.llm import LLM
from pagedlit.serving.sequence import SamplingParams

NUM_NEW = 16
VOCAB = 97
SPECIAL = dict(vocab_size=VOCAB, pad_token_id=0, bos_token_id=1, eos_token_id=2)
COMMON = dict(
    **SPECIAL, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=256, tie_word_embeddings=False,
)  # fmt: skip
WINDOW = dict(sliding_window=8)
ALTERNATING = dict(**WINDOW, layer_types=["sliding_attention", "full_attention", "sliding_attention"])
HEADS = dict(head_dim=16)
GEMMA = dict(**HEADS, query_pre_attn_scalar=16)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=32)
ROUTED = dict(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, n_group=1, topk_group=1, first_k_dense_replace=1)
LATENT = dict(kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16, num_key_value_heads=4)
SHARED_KV = dict(num_hidden_layers=4, num_kv_shared_layers=2, layer_types=["sliding_attention", "full_attention"] * 2, **WINDOW)
PER_LAYER_INPUT = dict(vocab_size_per_layer_input=VOCAB, hidden_size_per_layer_input=8)
GPT2 = dict(**SPECIAL, n_embd=64, n_inner=96, n_layer=3, n_head=4, n_positions=256, tie_word_embeddings=False)
YARN = dict(rope_parameters=dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=64))

RIGHT = {  # name: model type, and its config beyond COMMON
    "llama": ("llama", {}),
    "llama, yarn, one KV head": ("llama", dict(num_key_value_heads=1, **YARN)),
    "llama, tied weights": ("llama", dict(tie_word_embeddings=True)),
    "qwen2": ("qwen2", {}),
    "qwen2, window": ("qwen2", dict(use_sliding_window=True, **ALTERNATING)),
    "qwen2-moe, window in the mask alone": ("qwen2_moe", dict(use_sliding_window=True, **EXPERTS, **ALTERNATING)),
    "qwen3": ("qwen3", HEADS),
    "qwen3-moe": ("qwen3_moe", dict(**HEADS, **EXPERTS)),
    "mistral, window": ("mistral", WINDOW),
    "mixtral": ("mixtral", dict(num_local_experts=4, num_experts_per_tok=2)),
    "gemma": ("gemma", HEADS),
    "gemma2": ("gemma2", dict(**GEMMA, **ALTERNATING)),
    "gemma3": ("gemma3_text", dict(**GEMMA, **ALTERNATING)),
    "gemma3n, shared KV": ("gemma3n_text", dict(**HEADS, **SHARED_KV, **PER_LAYER_INPUT, laurel_rank=8, altup_num_inputs=2)),
    "gemma4, two head sizes, shared KV": ("gemma4_text", dict(**HEADS, **SHARED_KV, **PER_LAYER_INPUT, global_head_dim=32)),
    "gpt-oss, sinks": ("gpt_oss", dict(**HEADS, **ALTERNATING, num_local_experts=4, num_experts_per_tok=2)),
    "phi": ("phi", {}),
    "phi3": ("phi3", WINDOW),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", ALTERNATING),
    "cohere": ("cohere", dict(use_qk_norm=True)),
    "cohere2": ("cohere2", ALTERNATING),
    "stablelm": ("stablelm", dict(use_qkv_bias=True)),
    "starcoder2": ("starcoder2", WINDOW),
    "gpt-neox": ("gpt_neox", {}),
    "gpt2, learned positions": ("gpt2", GPT2),
    "gpt-bigcode, one KV head": ("gpt_bigcode", GPT2),
    "opt, learned positions": ("opt", dict(ffn_dim=96, word_embed_proj_dim=64)),
    "deepseek-v2, latent": ("deepseek_v2", dict(**LATENT, **ROUTED, topk_method="greedy")),
    "deepseek-v3, latent": ("deepseek_v3", dict(**LATENT, **ROUTED)),
    "granite": ("granite", dict(attention_multiplier=0.25, residual_multiplier=0.5)),
    "granite-moe": ("granitemoe", dict(num_local_experts=4, num_experts_per_tok=2, attention_multiplier=0.25)),
    "granite-hybrid, without mamba": ("granitemoehybrid", dict(layer_types=["full_attention"] * 3, shared_intermediate_size=32)),
    "smollm3, layers without positions": ("smollm3", dict(no_rope_layers=[1, 0, 1])),
    "glm4": ("glm4", HEADS),
    "nemotron": ("nemotron", HEADS),
    "exaone4": ("exaone4", dict(**HEADS, **ALTERNATING)),
    "modernbert-decoder": ("modernbert-decoder", dict(local_attention=8, layer_types=ALTERNATING["layer_types"])),
    "ernie4.5": ("ernie4_5", HEADS),
    "bert, as a decoder": ("bert", dict(is_decoder=True)),
}


def config_of(model_type, **given):
    """A tiny config: of COMMON, what the architecture knows."""
    known = set(AutoConfig.for_model(model_type).to_dict()) | {"num_key_value_heads"}
    return AutoConfig.for_model(model_type, **{key: value for key, value in COMMON.items() if key in known} | given)


def strengthen(model):
    """Random weights large enough that every token of the context counts; generation that never stops early."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "vision" not in name:
                parameter.mul_(8)
            elif "sinks" in name:
                parameter.normal_()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model.eval()


def build(model_type, given=None, dtype=torch.float32):
    torch.manual_seed(0)
    return strengthen(AutoModelForCausalLM.from_config(config_of(model_type, **(given or {})), dtype=dtype))


def some_prompts():
    """Mixed lengths; some share a prefix with another, up to the middle of a block or all of it."""
    rng = random.Random(1)
    prompts = [[rng.randrange(3, VOCAB) for _ in range(length)] for length in (1, 55, 9, 26)]
    return prompts + [prompts[1] + [5, 6], prompts[1][:-3] + [7], prompts[3][:18]]


PROMPTS = some_prompts()


def generate(model, prompts=PROMPTS):
    """The oracle: the model's own greedy generation, each prompt alone."""
    outputs = [model.generate(torch.tensor([prompt]), max_new_tokens=NUM_NEW, do_sample=False) for prompt in prompts]
    return [output[0, len(prompt) :].tolist() for output, prompt in zip(outputs, prompts)]


GREEDY = SamplingParams(temperature=0, max_tokens=NUM_NEW)
TWICE = SamplingParams(temperature=0, max_tokens=NUM_NEW, n=2)


def serve(llm, prompts=PROMPTS):
    """The answers; two of the prompts are answered twice, from one prefill, and both say the same."""
    outputs = llm.generate(prompts, [TWICE if i in (2, 5) else GREEDY for i in range(len(prompts))], use_tqdm=False)
    assert not any(output.error for output in outputs)
    assert all(answer.token_ids == output.outputs[0].token_ids for output in outputs for answer in output.outputs)
    llm.engine.check_invariants()
    return [output.outputs[0].token_ids for output in outputs]


@pytest.fixture(scope="module", params=RIGHT)
def case(request):
    """A model, and what it generates before anything here has touched it."""
    model = build(*RIGHT[request.param])
    want = generate(model)
    assert sum(len(set(tokens)) for tokens in want) > 3 * len(want), "answers of one token repeated would show little"
    return SimpleNamespace(model=model, want=want)


@pytest.mark.parametrize("block_size", [1, 3, 16, 64])
def test_chunks_hits_and_preemption(case, block_size):
    """Mixed lengths in one batch, chunks of a prompt, a pool too small for all; then the same from a warm cache."""
    llm = LLM(case.model, block_size=block_size, num_blocks=120 // block_size + 2, max_num_batched_tokens=20)
    assert serve(llm) == case.want
    cold = llm.stats()
    assert cold.num_preemptions > 0
    assert serve(llm) == case.want
    assert llm.stats().num_cached_tokens > cold.num_cached_tokens
    assert block_size == 1 or llm.stats().num_copies > 0, "some hit ends inside a block"


def test_fork(case):
    """Two answers from one prefill, forked in the middle of a prompt and in the middle of an answer."""
    engine, numbers = LLM(case.model, block_size=3, num_blocks=80, max_num_batched_tokens=20).engine, {}
    for index in (1, 2):
        numbers[engine.add_request(PROMPTS[index], GREEDY)] = index
    for seq_id in list(numbers) * 2:
        engine.step()
        numbers[engine.fork(seq_id)] = numbers[seq_id]
    answers = {seq.seq_id: seq.output_token_ids for seq in engine.drain()}
    assert len(answers) == 6
    assert all(answers[seq_id] == case.want[index] for seq_id, index in numbers.items())


def test_the_model_is_left_as_it_was(case):
    """Its own generation, after and between the steps of an engine."""
    before = case.model.config._attn_implementation
    engine = LLM(case.model, num_blocks=32).engine
    engine.add_request(PROMPTS[1], GREEDY)
    engine.step()
    assert case.model.config._attn_implementation == before
    assert not any(hasattr(module, "paged_layer") for module in case.model.modules())
    assert generate(case.model, PROMPTS[:3]) == case.want[:3]


def test_two_llms_share_one_model(case):
    """Their steps in turn, over pools of different block sizes."""
    llms = [LLM(case.model, block_size=size, num_blocks=64, max_num_batched_tokens=16) for size in (4, 16)]
    answers = [{}, {}]
    for llm in llms:
        for prompt in PROMPTS:
            llm.engine.add_request(prompt, GREEDY)
    while any(llm.engine.sequences for llm in llms):
        for llm, done in zip(llms, answers):
            done |= {seq.seq_id: seq.output_token_ids for seq in llm.engine.step() if len(seq.output_token_ids) == NUM_NEW}
    assert [[done[seq_id] for seq_id in sorted(done)] for done in answers] == [case.want, case.want]


# What is refused, and the cause that must be named


LLAMA = dict(num_hidden_layers=2, hidden_size=32, intermediate_size=32, num_attention_heads=4, num_key_value_heads=2)
BART = dict(d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=32, encoder_layers=2, encoder_ffn_dim=32)
MAMBA = dict(num_hidden_layers=2, hidden_size=32)
DELTA = dict(linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8)
FACTORS = dict(short_factor=[1.0] * 8, long_factor=[4.0] * 8)
DYNAMIC = dict(rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=2.0))
LONGROPE = dict(rope_parameters=dict(rope_type="longrope", rope_theta=1e4, original_max_position_embeddings=64, factor=4.0, **FACTORS))
MOSHI = dict(num_hidden_layers=2, audio_vocab_size=32, num_codebooks=2, sliding_window=8, ffn_dim=64, depth_decoder_config={})
CHUNKS = dict(attention_chunk_size=8, intermediate_size_mlp=96, num_local_experts=2, layer_types=["chunked_attention"] * 3)

REFUSED = {
    "mamba": ("mamba", MAMBA, "recurrent state"),
    "mamba2": ("mamba2", dict(**MAMBA, num_heads=4, head_dim=16), "recurrent state"),
    "rwkv": ("rwkv", dict(hidden_size=32, attention_hidden_size=32, num_hidden_layers=2), "recurrent state"),
    "hybrid": ("qwen3_next", dict(**HEADS, **EXPERTS, **DELTA, num_hidden_layers=4), "linear_attention .a recurrent state"),
    "hybrid inside each layer": ("falcon_h1", dict(mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16), "hybrid .a recurrent"),
    "convolution": ("lfm2", dict(layer_types=["conv", "full_attention", "conv"]), "conv .a convolution state"),
    "chunked attention": ("llama4_text", CHUNKS, "chunked_attention"),
    "no interface, alibi": ("bloom", dict(n_layer=2, hidden_size=32, n_head=4), "AttentionInterface"),
    "no interface": ("gptj", dict(n_embd=32, n_layer=2, n_head=4, rotary_dim=4), "AttentionInterface"),
    "no interface, position bias": ("mpt", dict(d_model=32, n_layers=2, n_heads=4), "AttentionInterface"),
    "positions not heard": ("bart", dict(**BART, is_decoder=True), "ignores position_ids"),
    "positions from elsewhere": ("roberta", dict(is_decoder=True), "does not count positions from 0"),
    "dynamic rotary embedding": ("llama", DYNAMIC, "max_model_len=256"),
    "longrope": ("llama", LONGROPE, "max_model_len=64"),
    "attends twice": ("diffllama", {}, "more than once"),
    "not causal": ("bert", dict(is_decoder=False), "not causal"),
    "made bidirectional": ("llama", dict(is_causal=False), "not causal"),
    "a mask of its own": ("doge", {}, "mask of its own"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_its_cause(name):
    model_type, given, cause = REFUSED[name]
    model = build(model_type, given)
    before = model.config._attn_implementation
    with pytest.raises(UnsupportedModel, match=cause) as caught:
        LLM(model, num_blocks=16)
    assert str(caught.value).startswith(type(model).__name__)
    assert model.config._attn_implementation == before and not any(hasattr(module, "paged_layer") for module in model.modules())


def test_an_encoder_decoder_is_refused():
    model = transformers.BartForConditionalGeneration(transformers.BartConfig(**SPECIAL, **BART, encoder_attention_heads=4))
    with pytest.raises(UnsupportedModel, match="encoder-decoder"):
        ModelRunner(model, num_blocks=16)


class Deaf(LlamaForCausalLM):
    """Counts columns, whatever position_ids say."""

    def forward(self, input_ids=None, position_ids=None, **kwargs):
        return super().forward(input_ids=input_ids, position_ids=torch.arange(input_ids.shape[1])[None], **kwargs)


class Shifting(LlamaForCausalLM):
    """Each token also gets the embedding of the one before it in its row: a convolution that nothing declares."""

    def forward(self, input_ids=None, **kwargs):
        embeds = self.get_input_embeddings()(input_ids)
        return super().forward(inputs_embeds=embeds + embeds.roll(1, dims=1), **kwargs)


class Biased(LlamaForCausalLM):
    """Hands its attention a bias that a KV cache knows nothing of."""

    def forward(self, input_ids=None, **kwargs):
        return super().forward(input_ids=input_ids, position_bias=torch.zeros(1), **kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("strong", [False, True])
@pytest.mark.parametrize("kind, cause", [(Deaf, "ignores position_ids"), (Shifting, "relative error"), (Biased, "position_bias")])
def test_what_no_config_tells_is_refused(kind, cause, dtype, strong):
    """In bfloat16 too, where the limit for a difference is wide, and with the small weights of a fresh model."""
    torch.manual_seed(0)
    model = kind(LlamaConfig(**COMMON)).eval().to(dtype)
    with pytest.raises(UnsupportedModel, match=cause):
        ModelRunner(strengthen(model) if strong else model, num_blocks=16)


def test_a_model_that_raises_is_refused_with_its_error():
    class Broken(LlamaForCausalLM):
        def forward(self, **kwargs):
            raise KeyError("pixel_values")

    with pytest.raises(UnsupportedModel, match="Broken.*KeyError.*pixel_values"):
        ModelRunner(Broken(LlamaConfig(**COMMON)), num_blocks=16)


def test_a_model_without_finite_logits_is_refused():
    model = build("llama")
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    with pytest.raises(UnsupportedModel, match="NaN"):
        ModelRunner(model, num_blocks=16)


# Masks


@pytest.mark.parametrize("window", [None, 1, 2, 7, 8, 512, 4096, 5000])
def test_a_window_fits_itself_alone(window):
    def rule(batch, head, query, key):
        return (key <= query) & (key > query - (window or 1 << 30))

    others = {None, 1, 2, 7, 8, 9, 512, 4095, 4096, 4097, 5000} - {window}
    assert fits(rule, window) and not any(fits(rule, other) for other in others)


@pytest.mark.parametrize("chunk", [3, 8, 1024, 8192])
def test_chunks_fit_no_window(chunk):
    def rule(batch, head, query, key):
        return (key <= query) & (key // chunk == query // chunk)

    assert not any(fits(rule, window) for window in (None, chunk - 1, chunk, chunk + 1))


def test_a_rule_about_the_tokens_of_its_batch_is_asked_within_them():
    block_of = torch.tensor([-1, -1, -1, -1])

    def rule(batch, head, query, key):
        return (key <= query) | ((block_of[query] == block_of[key]) & (block_of[query] >= 0))

    assert fits(rule, None) and fits(rule, 8) and not fits(rule, 2)


def test_rules_are_asked_on_the_host(monkeypatch):
    """An index beyond a tensor on a GPU is no IndexError: it ends all work of the process there."""
    of_tokens, copied = torch.zeros(1, 4, dtype=torch.long), []
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: copied.append(tensor.data_ptr()) or tensor)
    with OnHost(), pytest.raises(IndexError):
        of_tokens[torch.tensor(0), torch.tensor([7])]
    assert of_tokens.data_ptr() in copied


def test_weights_on_several_devices_are_refused():
    model = LlamaForCausalLM(LlamaConfig(**COMMON))
    model.lm_head.to("meta")
    with pytest.raises(UnsupportedModel, match=r"on several devices \(cpu, meta\): load it without device_map"):
        ModelRunner(model, num_blocks=8)


def test_a_large_window_in_the_mask_alone_is_found():
    """Far larger than any sequence of the self-check; that the layers do not name it is what the test is about."""
    window = dict(use_sliding_window=True, sliding_window=4096, layer_types=["full_attention"] + ["sliding_attention"] * 2)
    model = build("qwen2_moe", dict(**EXPERTS, **window, max_position_embeddings=32768))
    calls = discover_layers(model)
    assert [call.sliding_window for call in calls] == [None, None, None]
    assert [layer.sliding_window for _, layer in ModelRunner(model, num_blocks=16).layers] == [None, 4096, 4096]
    far = torch.tensor([10_000])
    seen = calls[1].rule(torch.tensor(0), torch.tensor(0), far[:, None], torch.arange(12_000))
    assert torch.equal(seen, visible(far, torch.arange(12_000), 4096))


# Around the model


def test_rotary_embeddings_that_follow_the_batch_are_exact_within_max_model_len():
    model, prompts = build("llama", LONGROPE), [prompt for prompt in PROMPTS if len(prompt) + NUM_NEW <= 64]
    want = generate(model, prompts)
    llm = LLM(model, block_size=3, num_blocks=80, max_num_batched_tokens=20, max_model_len=64)
    assert len(prompts) > 2 and serve(llm, prompts) == want
    [output] = llm.generate([PROMPTS[1] * 2], GREEDY, use_tqdm=False)
    assert output.error is not None, "longer than the rotary embedding stays as it is"
    with pytest.raises(UnsupportedModel, match="max_model_len=64"):
        LLM(model, num_blocks=80, max_model_len=65)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt-oss, sinks", "mixtral", "deepseek-v3, latent"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_passes(name, dtype):
    model_type, given = RIGHT[name]
    llm = LLM(build(model_type, given, dtype), num_blocks=64)
    assert llm.runner.kv_cache.layers[0][0].dtype == dtype
    assert all(len(tokens) == NUM_NEW for tokens in serve(llm))


def test_another_attention_implementation_stays():
    model = build("llama")
    model.set_attn_implementation("eager")
    want = generate(model)
    llm = LLM(model, num_blocks=64)
    assert serve(llm) == want
    assert model.config._attn_implementation == "eager" and generate(model, PROMPTS[:2]) == want[:2]


def test_the_owner_may_change_the_implementation_meanwhile():
    model = build("llama")
    llm, want = LLM(model, num_blocks=64), generate(model)
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        assert serve(llm) == want
        assert model.config._attn_implementation == implementation


class Terse(LlamaForCausalLM):
    """A model without logits_to_keep."""

    def forward(self, input_ids=None, position_ids=None, attention_mask=None, past_key_values=None, use_cache=None):
        given = dict(position_ids=position_ids, attention_mask=attention_mask, past_key_values=past_key_values, use_cache=use_cache)
        return super().forward(input_ids=input_ids, **given)


def test_a_model_without_logits_to_keep():
    model = build("llama")
    terse = Terse(model.config).eval()
    terse.load_state_dict(model.state_dict())
    llm = LLM(terse, num_blocks=64, max_num_batched_tokens=20)
    assert not llm.runner.takes_rows and serve(llm) == generate(model)


def test_the_text_part_of_a_multimodal_model():
    text = {key: value for key, value in COMMON.items() if key != "tie_word_embeddings"}
    vision = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8)
    torch.manual_seed(0)
    config = AutoConfig.for_model("llava", text_config=dict(text, model_type="llama"), vision_config=dict(vision, model_type="clip_vision_model"))
    config.image_token_id = VOCAB - 1
    model = strengthen(AutoModelForImageTextToText.from_config(config))
    prompts = [[min(token, VOCAB - 2) for token in prompt] for prompt in PROMPTS]
    assert serve(LLM(model, num_blocks=64, max_num_batched_tokens=20), prompts) == generate(model, prompts)


def test_a_step_that_fails_leaves_the_model_as_it_was():
    model = build("llama")
    llm, forward = LLM(model, num_blocks=64), model.lm_head.forward

    def fail(*args):
        raise RuntimeError("lost")

    llm.engine.add_request(PROMPTS[1], GREEDY)
    model.lm_head.forward = fail
    assert llm.engine.step() == [] and llm.engine.suspects
    model.lm_head.forward = forward
    assert model.config._attn_implementation == "sdpa" and not any(hasattr(module, "paged_layer") for module in model.modules())
    [seq] = llm.engine.drain()
    assert seq.output_token_ids == generate(model, PROMPTS[1:2])[0]


def test_a_row_without_finite_logits_is_named_and_the_others_are_right(monkeypatch):
    model = build("llama")
    engine, forward = LLM(model, num_blocks=64).engine, model.lm_head.forward

    def spoil(hidden):
        logits = forward(hidden)
        logits[0, 0] = torch.nan
        return logits

    want = generate(model, PROMPTS[2:4])
    for prompt in PROMPTS[2:4]:
        engine.add_request(prompt, GREEDY)
    monkeypatch.setattr(model.lm_head, "forward", spoil)
    output = engine.runner.run(engine.scheduler.schedule())
    assert list(output.errors) == [0] and isinstance(output.errors[0], BadLogits) and output.token_ids[1] == want[1][0]


@pytest.mark.parametrize("dtype, most", [(torch.float32, 4), (torch.bfloat16, 6)], ids=str)
def test_the_load_check_is_a_few_short_forwards(dtype, most, monkeypatch):
    """What it costs on a model that is too large for a copy: at most this many forwards, of at most 14 tokens each."""
    monkeypatch.setattr("pagedlit.compute.model_runner.MAX_COPIED_WEIGHTS", 0)
    model, sizes = build("llama", dtype=dtype), []
    model.register_forward_pre_hook(lambda module, args, kwargs: sizes.append(kwargs["input_ids"].numel()), with_kwargs=True)
    ModelRunner(model, num_blocks=16)
    assert 3 < len(sizes) <= most and max(sizes) <= 14


def test_a_large_model_in_bfloat16_must_hear_its_positions_too(monkeypatch):
    """It is not copied, the limit is wide, and the weights are small."""
    monkeypatch.setattr("pagedlit.compute.model_runner.MAX_COPIED_WEIGHTS", 0)
    torch.manual_seed(0)
    with pytest.raises(UnsupportedModel, match="ignores position_ids"):
        ModelRunner(Deaf(LlamaConfig(**COMMON)).bfloat16(), num_blocks=16)
    ModelRunner(LlamaForCausalLM(LlamaConfig(**COMMON)).bfloat16(), num_blocks=16)


def test_tokens_that_the_model_rules_out_do_not_hide_an_error():
    class Masking(Deaf):
        def forward(self, **kwargs):
            output = super().forward(**kwargs)
            output.logits[..., :10] = torch.finfo(torch.float32).min
            return output

    with pytest.raises(UnsupportedModel, match="ignores position_ids"):
        ModelRunner(strengthen(Masking(LlamaConfig(**COMMON))), num_blocks=16)
