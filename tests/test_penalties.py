"""Penalties and banned tokens: transformers' processors, plain Python in double precision, independence of the batch, the edges."""

import copy
import math
from array import array
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MinNewTokensLengthLogitsProcessor, RepetitionPenaltyLogitsProcessor

from pagedlit.compute.sampler import NO_TOKEN, BadLogits, adjust, places, probabilities, read_tokens, sample
from pagedlit.serving.sequence import History, SamplingParams

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
FREE = SamplingParams(temperature=0.0)


def history(prompt=(), output=(), banned=()) -> History:
    return History(array("i", [*prompt, *output]), len(prompt), frozenset(banned))


def make_batch(num_rows: int, vocab_size: int, seed: int, dtype=torch.float32, device="cpu"):
    """Logits, parameters, seeds, output lengths and histories; about a third of the rows have no history."""
    pick = np.random.default_rng(seed)
    logits = torch.from_numpy(pick.normal(size=(num_rows, vocab_size)) * 4).to(device, dtype)
    logits[torch.from_numpy(pick.random((num_rows, vocab_size)) < 0.05).to(device)] = -math.inf
    logits[:, 0] = 1.0
    params = [
        SamplingParams(
            temperature=float(pick.choice([0.0, 0.7, 1.5])),
            top_p=float(pick.choice([1.0, 0.9])),
            repetition_penalty=float(pick.choice([1.0, 1.3, 0.8])),
            frequency_penalty=float(pick.choice([0.0, 0.4, -2.0])),
            presence_penalty=float(pick.choice([0.0, 1.5, -0.3])),
        )
        for _ in range(num_rows)
    ]
    histories = {
        row: history(
            pick.integers(0, vocab_size, pick.integers(0, 30)).tolist(),
            pick.integers(0, vocab_size, pick.integers(0, 30)).tolist(),
            pick.integers(1, vocab_size, pick.integers(0, 4)).tolist() if vocab_size > 1 else (),
        )
        for row in range(num_rows)
        if pick.random() < 0.67
    }
    seeds = array("Q", pick.integers(0, 2**64, num_rows, dtype=np.uint64).tolist())
    return logits, params, seeds, array("i", pick.integers(0, 5000, num_rows).tolist()), histories


def take(batch, rows):
    logits, params, seeds, output_lens, histories = batch
    kept = {new: histories[old] for new, old in enumerate(rows) if old in histories}
    return logits[rows], [params[i] for i in rows], [seeds[i] for i in rows], [output_lens[i] for i in rows], kept


def expected(logits: list[float], p: SamplingParams, h: History) -> list[float]:
    """The definitions, in Python's doubles."""
    row, output = list(logits), Counter(h.token_ids[h.num_prompt_tokens :])
    for token in set(h.token_ids):
        row[token] *= p.repetition_penalty if row[token] < 0 else 1 / p.repetition_penalty
    for token, count in output.items():
        row[token] -= p.frequency_penalty * count
        row[token] -= p.presence_penalty
    return [-math.inf if token in h.banned else logit for token, logit in enumerate(row)]


# --- the definitions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", [1, 2, 37, 4099])
def test_adjusted_logits_follow_the_definitions(vocab_size, dtype, device):
    logits, params, _, _, histories = make_batch(60, vocab_size, vocab_size, dtype, device)
    adjusted = adjust(logits, params, histories)
    assert adjusted.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert adjusted.device == logits.device and histories and len(histories) < 60
    for row in range(60):
        if row not in histories:
            assert torch.equal(adjusted[row], logits[row].to(adjusted.dtype))
            continue
        reference = torch.tensor(expected(logits[row].tolist(), params[row], histories[row]), dtype=torch.float64)
        tolerance = {"rtol": 1e-14, "atol": 1e-13} if dtype == torch.float64 else {"rtol": 3e-7, "atol": 5e-6}
        torch.testing.assert_close(adjusted[row].cpu().double(), reference, **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("penalty", [1.1, 1.3, 2.0, 0.7])
def test_repetition_equals_transformers_bit_for_bit(penalty, dtype):
    pick = np.random.default_rng(1)
    logits = torch.from_numpy(pick.normal(size=(20, 300)) * 5).to(dtype)
    logits[0, :3] = torch.tensor([0.0, -0.0, -math.inf])
    token_ids = torch.from_numpy(pick.integers(0, 300, (20, 80)))
    token_ids[0, :3] = torch.arange(3)
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(token_ids, logits.clone())
    for num_prompt_tokens in (0, 33, 80):  # prompt and output alike
        histories = {row: History(array("i", ids), num_prompt_tokens, frozenset()) for row, ids in enumerate(token_ids.tolist())}
        ours = adjust(logits, [SamplingParams(repetition_penalty=penalty)] * 20, histories)
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("num_new_tokens", [0, 1, 4, 5, 9])
def test_banned_tokens_equal_transformers_min_new_tokens(num_new_tokens):
    eos, num_prompt_tokens, min_tokens = [2, 7], 6, 5
    token_ids = torch.randint(0, 50, (4, num_prompt_tokens + num_new_tokens))
    logits = torch.randn(4, 50)
    theirs = MinNewTokensLengthLogitsProcessor(num_prompt_tokens, min_tokens, eos)(token_ids, logits.clone())
    early = num_new_tokens < min_tokens
    histories = {i: History(array("i", ids), num_prompt_tokens, frozenset(eos)) for i, ids in enumerate(token_ids.tolist()) if early}
    assert torch.equal(adjust(logits, [SamplingParams(min_tokens=min_tokens)] * 4, histories), theirs)


def test_only_the_output_is_counted():
    logits, h = torch.zeros(2, 6), history(prompt=[1, 1, 2], output=[2, 3, 3, 3])
    params = [SamplingParams(frequency_penalty=0.5), SamplingParams(presence_penalty=0.5)]
    assert adjust(logits, params, {0: h, 1: h}).tolist() == [[0, 0, -0.5, -1.5, 0, 0], [0, 0, -0.5, -0.5, 0, 0]]
    assert torch.equal(adjust(logits, params, {0: history([1, 2, 3]), 1: history([4])}), logits)  # nothing generated yet


def test_a_ban_outlives_a_negative_penalty():
    p = SamplingParams(frequency_penalty=-2.0, presence_penalty=-2.0, repetition_penalty=0.5)
    assert adjust(torch.ones(1, 3), [p], {0: history([], [1, 1, 1], [1])})[0].tolist() == [1.0, -math.inf, 1.0]


# --- precision -------------------------------------------------------------------------------------------------------


def test_half_precision_is_widened_and_not_rounded_back():
    for dtype in (torch.bfloat16, torch.float16):
        logits = torch.full((2, 4), 20.0, dtype=dtype)
        adjusted = adjust(logits, [SamplingParams(frequency_penalty=0.001)] * 2, {1: history([], [3])})
        assert adjusted.dtype == torch.float32 and adjusted[0].tolist() == [20.0] * 4
        assert adjusted[1, 3].item() == pytest.approx(19.999, abs=2e-6) and adjusted[1, :3].tolist() == [20.0] * 3
    large = torch.full((1, 2), 40_000.0, dtype=torch.float16)  # 80,000 is too much for a float16
    assert adjust(large, [SamplingParams(repetition_penalty=0.5)], {0: history([1])}).tolist() == [[40_000.0, 80_000.0]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_neutral_history_changes_no_token(dtype):
    logits, params, seeds, output_lens, _ = make_batch(50, 400, 3, dtype)
    neutral = [SamplingParams(temperature=p.temperature, top_p=p.top_p) for p in params]
    histories = {row: history(range(20), range(30)) for row in range(0, 50, 2)}
    assert torch.equal(adjust(logits, neutral, histories).to(dtype), logits)
    assert torch.equal(sample(logits, neutral, seeds, output_lens, histories), sample(logits, neutral, seeds, output_lens))


# --- the same token whatever the batch -------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(data=st.data(), vocab_size=st.integers(1, 300), seed=st.integers(0, 2**32), dtype=st.sampled_from(DTYPES))
def test_a_row_never_notices_its_neighbours(data, vocab_size, seed, dtype):
    batch = make_batch(12, vocab_size, seed, dtype)
    rows = data.draw(st.lists(st.integers(0, 11), min_size=1, max_size=20))
    together = sample(*batch).tolist()
    assert sample(*take(batch, rows)).tolist() == [together[i] for i in rows]
    wide = adjust(batch[0], batch[1], batch[4]).to(torch.float64)
    assert torch.equal(adjust(take(batch, rows)[0], take(batch, rows)[1], take(batch, rows)[4]).to(torch.float64), wide[rows])


@settings(max_examples=80, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**32))
def test_other_histories_parameters_and_logits_do_not_matter(data, seed):
    first, other = make_batch(8, 60, seed), make_batch(8, 60, seed + 1)
    row = data.draw(st.integers(0, 7))
    mixed = other[0].clone(), [*other[1]], [*other[2]], [*other[3]], {i: h for i, h in other[4].items() if i != row}
    mixed[0][row], mixed[1][row], mixed[2][row], mixed[3][row] = first[0][row], first[1][row], first[2][row], first[3][row]
    if row in first[4]:
        mixed[4][row] = first[4][row]
    assert sample(*mixed)[row] == sample(*first)[row]


def test_ids_outside_the_vocabulary_touch_nobody():
    logits, p = torch.zeros(4, 10), SamplingParams(repetition_penalty=2.0, frequency_penalty=1.0, presence_penalty=1.0)
    ids = [10, 11, 25, 2**31 - 1, -1, -11]
    adjusted = adjust(logits, [p] * 4, {1: history(ids, ids, [10, 13, 10**12, -1])})
    assert torch.equal(adjusted, logits)
    assert places({3: ids + [4]}, 10).tolist() == [34]


# --- the edges -------------------------------------------------------------------------------------------------------


def test_no_history_costs_nothing():
    logits = torch.randn(3, 5)
    assert adjust(logits, [FREE] * 3, {}) is logits
    half = torch.randn(3, 5).half()
    assert adjust(half, [FREE] * 3, {}) is half


@pytest.mark.parametrize("make", [torch.clone, lambda x: x.t().contiguous().t(), lambda x: torch.cat([x, x], 1)[:, : x.shape[1]]])
def test_inputs_are_left_alone_whatever_their_strides(make):
    batch = make_batch(20, 50, 2)
    given_logits = make(batch[0])
    before, rest = given_logits.clone(), copy.deepcopy(batch[1:])
    adjusted = adjust(given_logits, batch[1], batch[4])
    sample(given_logits, *batch[1:])
    assert torch.equal(given_logits, before) and batch[1:] == rest
    assert torch.equal(adjusted, adjust(batch[0], batch[1], batch[4]))
    one = torch.randn(1, 50).expand(20, -1)  # rows that share their memory
    assert torch.equal(adjust(one, batch[1], batch[4]), adjust(one.contiguous(), batch[1], batch[4]))


def test_histories_can_grow_right_after():
    h = history([1, 2], [3])
    adjust(torch.zeros(1, 5), [SamplingParams(repetition_penalty=1.1, presence_penalty=1.0)], {0: h})
    h.token_ids.append(4)  # an exported buffer would refuse


def test_empty_batches_and_empty_histories():
    assert adjust(torch.empty(0, 50), [], {}).shape == (0, 50)
    assert sample(torch.empty(0, 50), [], array("Q"), array("i"), {}).shape == (0,)
    p = SamplingParams(repetition_penalty=2.0, presence_penalty=1.0)
    assert adjust(torch.ones(1, 1), [p], {0: history()}).tolist() == [[1.0]]
    assert adjust(torch.ones(1, 1), [p], {0: history([0], [0])}).tolist() == [[-0.5]]


@pytest.mark.parametrize("p", [FREE, SamplingParams(), SamplingParams(top_p=0.9), SamplingParams(top_k=3)])
def test_a_row_that_may_say_nothing_is_named(p):
    logits = torch.randn(3, 4)
    with pytest.raises(BadLogits) as caught:
        read_tokens(sample(logits, [p] * 3, range(3), [0] * 3, {1: history(banned=range(4))}))
    assert caught.value.rows == [1]
    others = sample(logits, [p] * 3, range(3), [0] * 3).tolist()
    assert caught.value.token_ids == [others[0], NO_TOKEN, others[2]]


def test_broken_rows_stay_broken_alone():
    logits, p = torch.randn(3, 8), SamplingParams(repetition_penalty=1.5, frequency_penalty=0.5)
    logits[1, 4] = math.nan
    histories = {row: history([4], [4, 5]) for row in range(3)}
    tokens = sample(logits, [p] * 3, range(3), [0] * 3, histories).tolist()
    assert tokens[1] == NO_TOKEN and NO_TOKEN not in (tokens[0], tokens[2])


def test_penalties_come_before_the_filters():
    logits = torch.tensor([[5.0, 4.0, 3.0, 0.0]])
    p = SamplingParams(presence_penalty=2.0, top_k=2)  # 3, 4, 3, 0: the tie for the second place stays together
    kept = probabilities(adjust(logits, [p], {0: history([], [0])}), [p]) > 0
    assert kept.tolist() == [[True, True, True, False]]
    tokens = sample(logits.expand(200, -1), [p] * 200, range(200), [0] * 200, {row: history([], [0]) for row in range(200)})
    assert set(tokens.tolist()) == {0, 1, 2}


def test_a_penalty_ends_a_loop():
    """A model that ignores its context, decoded greedily: frequency goes round the vocabulary, nothing else does."""
    logits, tokens = torch.linspace(0.8, 0, 5)[None], array("i")
    for _ in range(20):
        histories = {0: History(tokens, 0, frozenset())}
        tokens.append(sample(logits, [SamplingParams(temperature=0.0, frequency_penalty=1.0)], [0], [len(tokens)], histories).item())
    assert Counter(tokens) == {0: 4, 1: 4, 2: 4, 3: 4, 4: 4}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_adjusts_the_same_without_waiting():
    logits, params, _, _, histories = make_batch(100, 5003, 9)
    on_gpu = logits.cuda()
    adjust(on_gpu, params, histories)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        adjusted = adjust(on_gpu, params, histories)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(adjusted.cpu(), adjust(logits, params, histories), rtol=3e-7, atol=1e-6)
