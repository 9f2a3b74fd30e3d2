"""The sampler: independence of the batch, parity with transformers' processors, the distribution, the edges."""

import copy
import math
import pickle
from array import array

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from pagedlit.compute import sampler
from pagedlit.compute.sampler import (
    FULL_WEIGHT,
    NO_TOKEN,
    BadLogits,
    draw,
    mix64,
    probabilities,
    read_tokens,
    sample,
    top_cut,
    uniforms,
    weigh,
)
from pagedlit.serving.sequence import SamplingParams

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
GREEDY = SamplingParams(temperature=0.0)


def random_params(pick: np.random.Generator, num_rows: int) -> list[SamplingParams]:
    def choose(*values):
        return values[pick.integers(len(values))]

    return [
        SamplingParams(
            temperature=choose(0.0, 1e-3, 0.6, 1.0, 3.0),
            top_k=choose(0, -1, 1, 7, 50, 10**9),
            top_p=choose(1.0, 0.95, 0.5, 1e-6),
            min_p=choose(0.0, 0.0, 0.02, 1.0),
        )
        for _ in range(num_rows)
    ]


def make_batch(num_rows: int, vocab_size: int, seed: int, dtype=torch.float32, device="cpu"):
    pick = np.random.default_rng(seed)
    logits = torch.from_numpy(pick.normal(size=(num_rows, vocab_size)) * 3).to(device, dtype)
    logits[torch.from_numpy(pick.random((num_rows, vocab_size)) < 0.1).to(device)] = -math.inf
    logits[:, 0] = logits[:, 0].nan_to_num(neginf=0.0)  # one token is always allowed
    seeds = array("Q", pick.integers(0, 2**64, num_rows, dtype=np.uint64).tolist())
    return logits, random_params(pick, num_rows), seeds, array("i", pick.integers(0, 5000, num_rows).tolist())


def take(batch, rows):
    logits, params, seeds, output_lens = batch
    return logits[rows], [params[i] for i in rows], [seeds[i] for i in rows], [output_lens[i] for i in rows]


# --- the same token whatever the batch -------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("vocab_size", [1, 2, 37, 4099])
def test_alone_shuffled_split_and_padded_give_the_same(vocab_size, dtype, device):
    batch = make_batch(60, vocab_size, seed=vocab_size, dtype=dtype, device=device)
    together = sample(*batch).tolist()
    assert [sample(*take(batch, [i])).item() for i in range(60)] == together
    order = np.random.default_rng(0).permutation(60).tolist()
    assert sample(*take(batch, order)).tolist() == [together[i] for i in order]
    assert (
        sample(*take(batch, list(range(17)))).tolist() + sample(*take(batch, list(range(17, 60)))).tolist() == together
    )
    doubled = sample(*take(batch, [i for i in range(60) for _ in range(2)])).tolist()  # a row may repeat
    assert doubled[::2] == doubled[1::2] == together
    wide = torch.cat([batch[0], batch[0]], dim=1)[:, :vocab_size]  # rows that are not contiguous
    assert sample(wide, *batch[1:]).tolist() == together


@settings(max_examples=60, deadline=None)
@given(data=st.data(), vocab_size=st.integers(1, 300), seed=st.integers(0, 2**32))
def test_a_row_never_notices_its_neighbours(data, vocab_size, seed):
    batch = make_batch(12, vocab_size, seed)
    rows = data.draw(st.lists(st.integers(0, 11), min_size=1, max_size=20))
    together = sample(*batch).tolist()
    assert sample(*take(batch, rows)).tolist() == [together[i] for i in rows]


def test_a_row_never_notices_a_broken_neighbour():
    batch = make_batch(8, 500, seed=5)
    together = sample(*batch).tolist()
    batch[0][2], batch[0][5, 7] = -math.inf, math.nan
    assert sample(*batch).tolist() == [NO_TOKEN if i in (2, 5) else t for i, t in enumerate(together)]


def test_threads_and_long_rows_do_not_matter():
    batch = make_batch(6, 130_001, seed=1)  # longer than one chunk, odd
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = sample(*batch).tolist()
        torch.set_num_threads(2)
        assert sample(*batch).tolist() == one == [sample(*take(batch, [i])).item() for i in range(6)]
    finally:
        torch.set_num_threads(before)


def test_weights_do_not_depend_on_where_a_row_lies():
    logits = torch.randn(9, 1003) * 5
    whole = weigh(logits, [0.7] * 9)
    for row in range(9):
        for start in (0, 1, 3):
            copied = torch.empty(1003 + start)[start:].copy_(logits[row])
            assert (weigh(copied[None], [0.7])[0] == whole[row]).all()
    assert (weigh(logits.t().contiguous().t(), [0.7] * 9) == whole).all()


def test_inputs_are_left_alone_and_empty_batches_work():
    batch = make_batch(10, 50, seed=2, dtype=torch.float64)
    before = batch[0].clone(), copy.deepcopy(batch[1:])
    sample(*batch)
    assert torch.equal(batch[0], before[0]) and batch[1:] == before[1]
    assert sample(torch.empty(0, 50), [], array("Q"), array("i")).shape == (0,)


# --- the random numbers ----------------------------------------------------------------------------------------------


def test_streams_are_splitmix64():
    steps = np.arange(1, 6, dtype=np.uint64) * sampler.GOLDEN_GAMMA
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert mix64(np.uint64(1234567) + steps).tolist() == published


def test_uniforms_take_any_sequence_and_any_64_bits():
    seeds, output_lens = [0, 1, 2**63, 2**64 - 1], [0, 1, 2, 2**31 - 1]
    plain = uniforms(seeds, output_lens)
    assert plain.dtype == np.float64 and (plain == uniforms(array("Q", seeds), array("i", output_lens))).all()
    assert (plain == [uniforms([s], [n])[0] for s, n in zip(seeds, output_lens, strict=True)]).all() and plain.all()


def test_uniforms_are_uniform_and_independent():
    grid = uniforms(np.repeat(np.arange(700), 700), np.tile(np.arange(700), 700)).reshape(700, 700)
    assert 0 <= grid.min() and grid.max() < 1
    for first, second in (
        (grid[1:], grid[:-1]),
        (grid[:, 1:], grid[:, :-1]),
    ):  # neighbouring seeds; neighbouring tokens
        counts = np.bincount((first * 16).astype(int).ravel() * 16 + (second * 16).astype(int).ravel(), minlength=256)
        chi_square = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
        assert 160 < chi_square < 370  # 255 degrees of freedom: mean 255, standard deviation 22.6
    multiples = uniforms([int(sampler.GOLDEN_GAMMA) * i % 2**64 for i in range(4000)], np.arange(4000)[::-1])
    assert len(set(multiples.tolist())) == 4000  # shifted streams would all be one number


# --- the distribution ------------------------------------------------------------------------------------------------


def oracle(logits: torch.Tensor, p: SamplingParams) -> torch.Tensor:
    scores = TemperatureLogitsWarper(float(p.temperature))(None, logits[None].double())
    if p.top_k > 0:
        scores = TopKLogitsWarper(p.top_k)(None, scores)
    scores = TopPLogitsWarper(p.top_p)(None, scores) if p.top_p < 1 else scores
    return (MinPLogitsWarper(p.min_p)(None, scores) if p.min_p else scores).softmax(1)[0]


@pytest.mark.parametrize("vocab_size", [1, 5, 50, 2000, 32_003])
def test_probabilities_equal_those_of_transformers(vocab_size):
    pick = np.random.default_rng(vocab_size)
    params = [p for p in random_params(pick, 120) if p.temperature >= 0.6][: 60 if vocab_size < 10_000 else 10]
    logits = torch.from_numpy(pick.normal(size=(len(params), vocab_size)) * 2)
    ours, theirs = (
        probabilities(logits, params),
        torch.stack([oracle(row, p) for row, p in zip(logits, params, strict=True)]),
    )
    assert ours.dtype == torch.float64 and torch.allclose(ours, theirs, rtol=0, atol=1e-11)
    assert ((ours > 0) == (theirs > 1e-12 * theirs.amax(1, keepdim=True))).all()


@pytest.mark.parametrize(
    "p",
    [
        SamplingParams(),
        SamplingParams(temperature=2.0, top_k=6),
        SamplingParams(top_p=0.8),
        SamplingParams(temperature=0.7, min_p=0.05),
        SamplingParams(top_k=9, top_p=0.95, min_p=0.02),
    ],
)
def test_frequencies(p):
    logits = torch.randn(40, generator=torch.Generator().manual_seed(0)) * 1.5
    num_draws, expected = 60_000, probabilities(logits[None], [p])[0] * 60_000
    seeds, steps = np.divmod(np.arange(num_draws), 100)
    counts = sample(logits.expand(num_draws, -1), [p] * num_draws, seeds, steps).bincount(minlength=40)
    assert counts[expected == 0].sum() == 0
    drawn = expected > 5
    chi_square = ((counts - expected) ** 2 / expected)[drawn].sum().item()
    freedom = int(drawn.sum()) - 1
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)
    assert (counts - expected).abs().sum() / (2 * num_draws) < 0.01  # total variation


def test_greedy_is_argmax():
    logits = torch.randint(0, 3, (200, 31)).float()  # full of ties
    first = torch.tensor([row.tolist().index(max(row)) for row in logits])
    assert torch.equal(sample(logits, [GREEDY] * 200, [0] * 200, [0] * 200), logits.argmax(1))
    assert torch.equal(logits.argmax(1), first)
    mixed = [GREEDY, SamplingParams(temperature=5.0)] * 100
    assert torch.equal(sample(logits, mixed, [0] * 200, [0] * 200)[::2], first[::2])


@pytest.mark.parametrize(
    "p",
    [
        SamplingParams(top_k=1),
        SamplingParams(top_p=1e-9),
        SamplingParams(min_p=1.0),
        SamplingParams(temperature=1e-320),
    ],
)
def test_the_tightest_setting_of_each_filter_is_greedy(p):
    logits = torch.randn(50, 100)
    assert torch.equal(sample(logits, [p] * 50, range(50), range(50)), logits.argmax(1))


def test_ties_stay_together():
    logits = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0]])
    assert (probabilities(logits, [SamplingParams(top_k=2)]) > 0).tolist() == [[True, True, True, True, False]]
    assert (probabilities(logits, [SamplingParams(top_p=0.5)]) > 0).tolist() == [[True, True, True, True, False]]
    beside = [SamplingParams(top_k=2, top_p=0.999), SamplingParams(top_k=5)]  # a longer list beside it changes nothing
    assert torch.equal(probabilities(logits.expand(2, -1), beside)[:1], probabilities(logits, beside[:1]))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(0, 20), min_size=1, max_size=12), st.integers(1, 12), st.floats(0.01, 1.0), st.integers(0, 12)
)
def test_cuts_follow_their_definition(weights, k, p, longer):
    if not any(weights):
        weights[0] = 1
    k, num = min(k, len(weights)), len(weights)
    kth = sorted(weights)[-k]
    left = [w for w in weights if w >= kth]
    needed = max(1, math.ceil(p * sum(left)))
    expected = max(w for w in set(left) if sum(x for x in left if x >= w) >= needed)
    beside = min(num, k + longer)  # the neighbour's list length
    assert top_cut(torch.tensor([weights, weights]), [k, beside], [p, 1.0])[0].item() == expected


def test_totals_beyond_the_bits_of_a_double():
    weights = torch.tensor([[1, 2**52 + 3, 2**52]] * 2)  # the two largest sum to 2**53 + 3, as a double 2**53 + 4
    assert top_cut(weights, [2, 3], [1.0, 1.0]).tolist() == [[2**52], [1]]


def test_only_top_k_and_top_p_make_lists(monkeypatch):
    lengths = []
    ascending = sampler.ascending
    monkeypatch.setattr(sampler, "ascending", lambda w, n: lengths.append((len(w), n)) or ascending(w, n))
    logits = torch.randn(4, 1000)
    sample(logits, [GREEDY, SamplingParams(), SamplingParams(min_p=0.1), SamplingParams(top_k=1000)], [0] * 4, [0] * 4)
    assert lengths == []
    sample(
        logits,
        [SamplingParams(), SamplingParams(top_k=5), SamplingParams(top_k=9, top_p=0.9), SamplingParams(top_p=0.9)],
        [0] * 4,
        [0] * 4,
    )
    assert lengths == [(2, 9), (1, 1000)]


# --- the edges -------------------------------------------------------------------------------------------------------


def test_no_u_lands_on_a_zero():
    weights = torch.tensor([[0, 0, 1, 0, FULL_WEIGHT, 0, 0]])
    for u in (0.0, 2**-53, 0.5, 1 - 2**-53):
        assert draw(weights, torch.tensor([u], dtype=torch.float64)).item() in (2, 4)
    long = torch.zeros(1, 2**21, dtype=torch.long)
    long[0, 10:-10] = FULL_WEIGHT  # the total has 61 bits, a double 53
    assert draw(long, torch.tensor([0.0], dtype=torch.float64)).item() == 10
    assert draw(long, torch.tensor([1 - 2**-53], dtype=torch.float64)).item() == 2**21 - 11


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 2**59), min_size=1, max_size=7).filter(any), st.integers(1, 2**53))
def test_draws_stay_inside_any_total(weights, steps_below_one):
    token = draw(
        torch.tensor([[*weights, 0]]), torch.tensor([1 - steps_below_one * 2.0**-53], dtype=torch.float64)
    ).item()
    assert token < len(weights) and weights[token] > 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("p", [GREEDY, SamplingParams(), SamplingParams(top_p=0.9), SamplingParams(top_k=3, min_p=0.1)])
def test_bad_rows_are_named_and_the_others_are_good(bad, p):
    logits = torch.randn(5, 40)
    good = sample(logits, [p] * 5, range(5), [0] * 5).tolist()
    logits[1] = bad
    logits[4, 3] = bad if bad != -math.inf else 0.0
    if bad == -math.inf:
        logits[4] = bad
    with pytest.raises(BadLogits, match=r"rows \[1, 4\] of 5") as caught:
        read_tokens(sample(logits, [p] * 5, range(5), [0] * 5))
    assert isinstance(caught.value, ValueError) and caught.value.rows == [1, 4]
    assert caught.value.token_ids == [NO_TOKEN if i in (1, 4) else t for i, t in enumerate(good)]
    assert pickle.loads(pickle.dumps(caught.value)).rows == [1, 4]


def test_masked_tokens_are_never_drawn():
    logits = torch.full((300, 64), -math.inf)
    logits[:, 5], logits[:, 60] = 0.0, -1.0
    tokens = sample(
        logits,
        [SamplingParams(temperature=9.0), SamplingParams(top_p=0.99), SamplingParams(top_k=30)] * 100,
        range(300),
        [1] * 300,
    )
    assert set(read_tokens(tokens)) == {5, 60}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_draws_the_same_without_waiting():
    batch = make_batch(200, 5003, seed=9)
    expected = sample(*batch).tolist()
    logits = batch[0].cuda()
    sample(logits, *batch[1:])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        tokens = sample(logits, *batch[1:])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    same = sum(a == b for a, b in zip(read_tokens(tokens), expected, strict=True))
    assert same >= 199  # exp2 may round differently on another device
