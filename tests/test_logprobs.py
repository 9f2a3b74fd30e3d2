"""Log-probabilities: torch.log_softmax in float64, ranks and ties by plain sorting, independence of the batch, the edges."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pagedlit.compute import logprobs as logprobs_module
from pagedlit.compute.logprobs import logprobs_of, most_likely
from pagedlit.compute.sampler import NO_TOKEN
from pagedlit.serving.sequence import Logprob

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
TOLERANCE = 1e-7  # absolute: V * 2**-41 = 6e-8 for V = 131,072, by the rounding of the weights


def by_sorting(logits: torch.Tensor, token_id: int, num_top: int) -> dict[int, tuple[float, int]]:
    """One row by definition: float64 log_softmax of the float32 logits; rank = 1 + how many are more likely."""
    row, exact = logits.float().tolist(), logits.float().double().log_softmax(0).tolist()
    order = sorted(range(len(row)), key=lambda token: (-row[token], token))
    return {token: (exact[token], 1 + sum(x > row[token] for x in row)) for token in [token_id, *order[:num_top]]}


def check(ours: dict[int, Logprob], theirs: dict[int, tuple[float, int]]) -> None:
    assert list(ours) == list(theirs)
    for token, (logprob, rank) in theirs.items():
        assert ours[token].rank == rank and ours[token].decoded_token is None
        assert ours[token].logprob == logprob or abs(ours[token].logprob - logprob) <= TOLERANCE
        assert type(ours[token].rank) is int and type(token) is int and type(ours[token].logprob) is float


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("vocab_size", [1, 2, 37, 4099])
def test_rows_follow_the_definition(vocab_size, dtype, device):
    pick = np.random.default_rng(vocab_size)
    logits = torch.from_numpy(pick.normal(size=(50, vocab_size)) * 4).to(device, dtype)
    token_ids, num_top = pick.integers(0, vocab_size, 50).tolist(), pick.choice([0, 1, 5, 20], 50).tolist()
    rows = logprobs_of(logits, torch.tensor(token_ids, device=device), num_top)
    assert len(rows) == 50
    for row, token_id, n, ours in zip(logits.cpu(), token_ids, num_top, rows, strict=True):
        check(ours, by_sorting(row, token_id, n))
    assert logprobs_of(logits, token_ids, num_top) == rows  # token ids from the host


@pytest.mark.parametrize("fill", [-28.0, -27.8, -5.0, 0.0, 3.0])
def test_the_worst_rows_stay_within_the_tolerance(fill):
    """131,071 equal tokens beside one: all their roundings point the same way."""
    logits = torch.full((1, 131_072), fill)
    logits[0, 77] = 0.0
    exact = logits[0].double().log_softmax(0)
    for token in (77, 0):
        assert abs(logprobs_of(logits, [token], [0])[0][token].logprob - exact[token].item()) <= TOLERANCE


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from([0.0, -0.0, 1.0, 1.5, -1.0, -2.5, 1e-40, -1e-40, -math.inf]), min_size=1, max_size=12).filter(
        lambda row: max(row) > -math.inf
    ),
    st.integers(0, 11),
    st.integers(0, 15),
)
def test_ties_go_to_the_lowest_id_and_share_a_rank(row, token_id, num_top):
    token_id %= len(row)
    check(logprobs_of(torch.tensor([row]), [token_id], [num_top])[0], by_sorting(torch.tensor(row), token_id, num_top))


def test_ties_in_half_precision():
    logits = torch.randn(20, 3000).bfloat16()  # some 8 bits: full of ties
    listed = most_likely(logits.float(), 40)
    for row, ids in zip(logits.tolist(), listed.tolist(), strict=True):
        assert ids == sorted(range(3000), key=lambda token: (-row[token], token))[:40]


@settings(max_examples=60, deadline=None)
@given(data=st.data(), vocab_size=st.integers(1, 300), seed=st.integers(0, 2**32))
def test_a_row_never_notices_its_neighbours(data, vocab_size, seed):
    pick = np.random.default_rng(seed)
    logits = torch.from_numpy(pick.normal(size=(12, vocab_size)) * 3).float()
    token_ids, num_top = pick.integers(0, vocab_size, 12).tolist(), pick.integers(0, 9, 12).tolist()
    together = logprobs_of(logits, token_ids, num_top)
    rows = data.draw(st.lists(st.integers(0, 11), min_size=1, max_size=20))
    assert logprobs_of(logits[rows], [token_ids[i] for i in rows], [num_top[i] for i in rows]) == [together[i] for i in rows]


def test_chunks_and_threads_do_not_matter(monkeypatch):
    logits, token_ids, num_top = torch.randn(11, 1003) * 4, list(range(11)), [0, 3, 0, 0, 1003, 5, 0, 2, 2000, 0, 1]
    before, threads = logprobs_of(logits, token_ids, num_top), torch.get_num_threads()
    assert [len(row) for row in before][4] == len(before[8]) == 1003
    try:
        for at_once in (1, 2, 5, 100):
            monkeypatch.setattr(logprobs_module, "rows_at_once", lambda logits, n=at_once: n)
            torch.set_num_threads(at_once % 3 + 1)
            assert logprobs_of(logits, token_ids, num_top) == before
    finally:
        torch.set_num_threads(threads)


def test_rows_with_no_top_list_nothing(monkeypatch):
    monkeypatch.setattr(logprobs_module, "most_likely", None)  # would raise
    logits = torch.randn(3, 9)
    assert [list(row) for row in logprobs_of(logits, [4, 0, 8], [0] * 3)] == [[4], [0], [8]]


def test_one_transfer(monkeypatch):
    moved, cpu = [], torch.Tensor.cpu
    monkeypatch.setattr(logprobs_module, "rows_at_once", lambda logits: 2)
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: moved.append(self.numel()) or cpu(self))
    logprobs_of(torch.randn(7, 9), [0] * 7, [0, 0, 2, 0, 1, 1, 0])
    assert moved == [3 * (2 + 2 * 3 + 2 * 2 + 1)]  # a chunk is as wide as its widest row


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_without_a_distribution_gives_nothing(bad):
    logits = torch.randn(4, 6)
    good = logprobs_of(logits, [1, 2, 3, 4], [2] * 4)
    logits[1], logits[2, 0] = bad, math.nan
    assert logprobs_of(logits, [1, 2, 3, 4], [2] * 4) == [good[0], {}, {}, good[3]]


def test_ids_outside_the_vocabulary_give_nothing():
    logits = torch.randn(4, 6)
    for num_top in (0, 2):
        rows = logprobs_of(logits, [NO_TOKEN, 6, 5, 10**6], [num_top] * 4)
        assert [bool(row) for row in rows] == [False, False, True, False]


def test_masked_tokens_are_impossible_and_last():
    row = logprobs_of(torch.tensor([[0.0, -math.inf, 0.0, -math.inf]]), [3], [4])[0]
    assert list(row) == [3, 0, 2, 1]
    assert row[3] == row[1] == Logprob(-math.inf, 3) and row[0] == row[2] == Logprob(-math.log(2), 1)


def test_shapes_and_inputs():
    assert logprobs_of(torch.empty(0, 5), [], []) == []
    assert logprobs_of(torch.empty(0, 5), torch.empty(0, dtype=torch.long), []) == []
    assert logprobs_of(torch.tensor([[3.0]]), [0], [5]) == [{0: Logprob(0.0, 1)}]
    logits, token_ids = torch.randn(30, 9).t().contiguous().t(), torch.arange(30) % 9
    before = logits.clone(), token_ids.clone()
    rows = logprobs_of(logits, token_ids, [3] * 30)
    assert torch.equal(logits, before[0]) and torch.equal(token_ids, before[1])
    assert rows == logprobs_of(logits.contiguous(), token_ids.tolist(), [3] * 30)
    assert logprobs_of(logits, token_ids.int(), [3] * 30) == rows


def test_probabilities_sum_to_one():
    logits = torch.randn(5, 400) * 3
    for row in logprobs_of(logits, [0] * 5, [400] * 5):
        assert abs(math.fsum(math.exp(entry.logprob) for entry in row.values()) - 1) < 1e-9
        assert sorted(entry.rank for entry in row.values()) == list(range(1, 401))
