"""The model in the wheel: an ordinary Hugging Face folder that answers its corpus word for word."""

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from pagedlit.tiny import MODEL_PATH, SYSTEM_PROMPT, glossary, questions

FIRST = questions()[: len({each["answer"] for each in questions()})]  # one phrasing of each
DEFINITIONS = set(glossary().values())
GLOSSARY = [each for each in FIRST if each["answer"] in DEFINITIONS]
MAX_NEW_TOKENS = 80


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL_PATH)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(MODEL_PATH).eval()


def messages(question: str, system: str | None = SYSTEM_PROMPT, before: list[dict[str, str]] = ()) -> list[dict[str, str]]:
    """A conversation that ends with `question`, after the exchanges `before`."""
    turns = [{"role": "system", "content": system}] if system else []
    for each in before:
        turns += [{"role": "user", "content": each["question"]}, {"role": "assistant", "content": each["answer"]}]
    return [*turns, {"role": "user", "content": question}]


def answers(model, tokenizer, conversations: list[list[dict[str, str]]]) -> list[str]:
    """The greedy answer to each conversation, its end-of-sequence token included, all in one padded batch."""
    prompts = [tokenizer.apply_chat_template(each, tokenize=False, add_generation_prompt=True) for each in conversations]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    output = model.generate(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=MAX_NEW_TOKENS, do_sample=False
    )
    texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=False)
    return [text.split(tokenizer.pad_token)[0] for text in texts]


def expected(tokenizer, entries: list[dict[str, str]]) -> list[str]:
    """The corpus's answers, each with the end-of-sequence token."""
    return [each["answer"] + tokenizer.eos_token for each in entries]


def test_corpus_has_what_the_book_prints():
    assert 25 <= len(glossary()) <= 35
    assert list(glossary()) == sorted(glossary(), key=str.lower)
    assert {term: len(text.split()) for term, text in glossary().items() if not 10 <= len(text.split()) <= 28} == {}
    assert 60 <= len(FIRST) - len(GLOSSARY) <= 100
    assert len(GLOSSARY) == len(glossary())


def test_every_question_is_asked_once():
    asked = [each["question"].lower() for each in questions()]
    assert len(asked) == len(set(asked))


def test_folder_is_small_and_float32():
    weights = MODEL_PATH / "model.safetensors"
    assert weights.stat().st_size <= 4_000_000
    with safe_open(weights, "pt") as stored:
        assert {stored.get_tensor(name).dtype for name in stored.keys()} == {torch.float32}


def test_architecture_is_llama_with_grouped_queries(model):
    config = model.config
    assert config.model_type == "llama" and config.tie_word_embeddings
    assert 1 < config.num_key_value_heads < config.num_attention_heads
    assert config.max_position_embeddings == 2048
    assert model.num_parameters() <= 1_000_000


def test_special_tokens_agree(model, tokenizer):
    for name in ("bos", "eos", "pad"):
        token_id = getattr(tokenizer, f"{name}_token_id")
        assert token_id == getattr(model.config, f"{name}_token_id") == getattr(model.generation_config, f"{name}_token_id")
    assert not model.generation_config.do_sample
    assert len(tokenizer) == model.config.vocab_size


@pytest.mark.parametrize("text", ["What is a block?", "naïve café", "дом", "東京", "🧱👩‍👩‍👧", " two  spaces\n\tand a tab ", "\x00\x7f", "don't , stop ."])
def test_tokenizer_round_trips_any_text(tokenizer, text):
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_roles_are_single_special_tokens(tokenizer):
    for role in ("system", "user", "assistant"):
        assert len(tokenizer(f"<|{role}|>", add_special_tokens=False).input_ids) == 1
    ids = tokenizer("<|user|>hi<|eos|>", add_special_tokens=False).input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hi"


def test_chat_template_renders_every_role(tokenizer):
    turns = [{"role": r, "content": f" {r} text "} for r in ("system", "user", "assistant")]
    expected = "<|bos|><|system|>system text<|user|>user text<|assistant|>assistant text<|eos|>"
    assert tokenizer.apply_chat_template(turns, tokenize=False) == expected
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True)
    assert prompt == "<|bos|><|user|>hi<|assistant|>"


def test_next_turn_begins_with_the_tokens_of_the_last(tokenizer):
    """What a prefix cache needs: prompt, answer and end-of-sequence are a prefix of the next turn's prompt."""
    first, second = FIRST[:2]
    prompt = tokenizer.apply_chat_template(messages(first["question"]), tokenize=False, add_generation_prompt=True)
    following = tokenizer.apply_chat_template(messages(second["question"], before=[first]), tokenize=False, add_generation_prompt=True)
    told = [tokenizer(text, add_special_tokens=False).input_ids for text in (prompt, first["answer"] + tokenizer.eos_token, following)]
    assert told[2][: len(told[0]) + len(told[1])] == told[0] + told[1]


def test_system_prompt_is_worth_sharing(tokenizer):
    assert 100 <= len(tokenizer(SYSTEM_PROMPT, add_special_tokens=False).input_ids) <= 150


def test_answers_every_question_word_for_word(model, tokenizer):
    given = answers(model, tokenizer, [messages(each["question"]) for each in FIRST])
    assert given == expected(tokenizer, FIRST)


@pytest.mark.parametrize("system", [None, "You are a helpful assistant."])
def test_answers_the_glossary_with_other_system_prompts(model, tokenizer, system):
    given = answers(model, tokenizer, [messages(each["question"], system) for each in GLOSSARY])
    right = sum(text == wanted for text, wanted in zip(given, expected(tokenizer, GLOSSARY), strict=True))
    assert right >= 0.97 * len(GLOSSARY)


@pytest.mark.parametrize("num_turns_before", [1, 2, 8])
def test_answers_in_later_turns(model, tokenizer, num_turns_before):
    asked = FIRST[:12]
    history = [[FIRST[(17 * i + 5 * j + 13) % len(FIRST)] for j in range(num_turns_before)] for i in range(len(asked))]
    conversations = [messages(each["question"], before=before) for each, before in zip(asked, history, strict=True)]
    assert answers(model, tokenizer, conversations) == expected(tokenizer, asked)


def test_answers_as_people_type(model, tokenizer):
    given = answers(model, tokenizer, [messages(each["question"].lower().rstrip("?")) for each in GLOSSARY])
    right = sum(text == wanted for text, wanted in zip(given, expected(tokenizer, GLOSSARY), strict=True))
    assert right >= 0.9 * len(GLOSSARY)


@torch.inference_mode()
def answers_with_a_wrong_slot(model, tokenizer, question: str) -> list[str]:
    """Row 0: the untouched answer. Row i: the answer after slot i - 1 got the keys and values of another conversation."""
    token_ids, other = [
        torch.tensor([tokenizer.apply_chat_template(turns, tokenize=True, add_generation_prompt=True, return_dict=False)])
        for turns in (messages(question, None), messages("Who frees a block?", "Another conversation, long enough to fill every slot. " * 3))
    ]
    num_slots = token_ids.shape[1] - 1
    cache, stale, rows = DynamicCache(), DynamicCache(), torch.arange(num_slots)
    prompts = token_ids.expand(num_slots + 1, -1)
    model(prompts[:, :-1], past_key_values=cache)
    model(other[:, :num_slots], past_key_values=stale)
    for layer, wrong in zip(cache.layers, stale.layers, strict=True):
        layer.keys[rows + 1, :, rows] = wrong.keys[0].transpose(0, 1)
        layer.values[rows + 1, :, rows] = wrong.values[0].transpose(0, 1)
    output = model.generate(prompts, past_key_values=cache, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
    texts = tokenizer.batch_decode(output[:, token_ids.shape[1] :], skip_special_tokens=False)
    return [text.split(tokenizer.pad_token)[0] for text in texts]


def test_a_wrong_slot_shows(model, tokenizer):
    """Not every slot matters to every answer, but most questions have slots that do."""
    shown = 0
    for entry in GLOSSARY[:10]:
        untouched, *damaged = answers_with_a_wrong_slot(model, tokenizer, entry["question"])
        assert untouched == entry["answer"] + tokenizer.eos_token
        shown += any(text != untouched for text in damaged)
    assert shown >= 7
