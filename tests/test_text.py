"""Where a text ends: at a stop string, found as it grows, and never shown before it is clear what it is."""

from array import array

import pytest
from transformers import AutoTokenizer

from pagedlit.compute.text import Answer, named
from pagedlit.serving.sequence import Logprob, SamplingParams, Sequence, SequenceStatus
from pagedlit.tiny import MODEL_PATH, questions

TEXT = questions()[0]["answer"]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL_PATH)


def reading(tokenizer, **options):
    """An answer to an empty prompt, its token ids, and after each of them what `find_stop` says and what is shown."""
    token_ids = tokenizer(TEXT, add_special_tokens=False).input_ids
    seq = Sequence(0, array("i", [0]), 1, SamplingParams(max_tokens=len(token_ids), **options))
    answer, steps = Answer(seq, tokenizer), []
    for token_id in token_ids:
        seq.token_ids.append(token_id)
        if len(steps) + 1 == len(token_ids):
            seq.status = SequenceStatus.FINISHED
        steps.append((answer.find_stop(), answer.text()))
    return answer, token_ids, steps


def test_every_place_of_a_stop_string_is_found_once_and_never_shown(tokenizer):
    for start in range(1, len(TEXT) - 6):
        stop = TEXT[start : start + 6]
        want = TEXT[: TEXT.find(stop)]
        answer, _, steps = reading(tokenizer, stop=[stop, "never \x00"])
        assert [found for found, _ in steps if found] == [stop] and answer.text() == want
        assert all(want.startswith(shown) for _, shown in steps), "what was shown stays, and holds nothing of the stop string"


def test_a_beginning_that_is_no_stop_string_is_shown_in_the_end(tokenizer):
    answer, _, steps = reading(tokenizer, stop=[TEXT[-4:] + "x"])
    assert not any(found for found, _ in steps) and answer.text() == TEXT
    assert steps[-2][1] in TEXT[:-1] and all(TEXT.startswith(shown) for _, shown in steps)


def test_min_tokens_shield_from_stop_strings(tokenizer):
    stop = TEXT[:5]
    assert reading(tokenizer, stop=stop)[0].text() == ""
    _, _, steps = reading(tokenizer, stop=stop, min_tokens=4)
    assert not any(found for found, _ in steps[:4]), "the shield holds for the first four tokens"


def test_rated_tokens_are_named(tokenizer):
    answer, token_ids, _ = reading(tokenizer)
    rated = [{token_id: Logprob(-0.5, 1)} for token_id in token_ids[:3]]
    answer.seq.logprobs.extend(rated[:2])
    first = answer.logprobs()
    answer.seq.logprobs.extend(rated[2:])
    assert first == answer.logprobs()[:2] and len(answer.logprobs()) == 3, "each is named once"
    assert [each[token_id].decoded_token for each, token_id in zip(answer.logprobs(), token_ids)] == [tokenizer.decode([t]) for t in token_ids[:3]]
    assert named(rated[0], None) is rated[0], "without a tokenizer there are no names"
