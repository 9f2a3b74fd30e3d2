"""The Prometheus exposition: counts that can be checked by hand, and an engine that is left as it was."""

from __future__ import annotations

import pytest

pytest.importorskip("prometheus_client")
from prometheus_client.parser import text_string_to_metric_families

from pagedlit import LLM, SamplingParams
from pagedlit.metrics import LATENCIES, Metrics


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(num_blocks=32)


def values(metrics: Metrics) -> dict[tuple[str, tuple[str, ...]], float]:
    """Every sample of the exposition, by name and label values."""
    families = text_string_to_metric_families(metrics.text())
    return {(sample.name, tuple(sample.labels.values())): sample.value for family in families for sample in family.samples}


def test_counts_follow_the_requests(llm: LLM) -> None:
    llm.engine.scheduler.cache.clear()
    metrics = Metrics(llm)
    prompt = list(range(10, 50))
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    llm.generate(prompt, params, use_tqdm=False)
    llm.generate([prompt, prompt], SamplingParams(n=3, temperature=0, max_tokens=5, ignore_eos=True), use_tqdm=False)
    aborted = llm.add_request(prompt, params)
    llm.step()
    llm.abort(aborted)
    llm.step()
    found = values(metrics)
    assert found["pagedlit_request_success_total", ("length",)] == 1 + 2 * 3 and found["pagedlit_request_success_total", ("abort",)] == 1
    assert found["pagedlit_prompt_tokens_total", ()] == 4 * 40 and found["pagedlit_generation_tokens_total", ()] == 7 * 5 + 1
    assert found["pagedlit_cached_tokens_total", ()] == 3 * 39
    assert found["pagedlit_events_total", ("finished",)] == 8 and found["pagedlit_event_tokens_total", ("hit",)] == 3 * 39
    assert found["pagedlit_events_total", ("copied",)] > 0
    assert all(found[f"pagedlit_{name}_count", ()] == 4 for name in LATENCIES if name != "time_per_output_token_seconds")
    assert found["pagedlit_kv_cache_usage_ratio", ()] == 0 and found["pagedlit_num_requests_running", ()] == 0
    metrics.close()


def test_events_of_the_pool_add_up(llm: LLM) -> None:
    """What was allocated has been released, or is cached."""
    llm.engine.scheduler.cache.clear()
    metrics = Metrics(llm)
    prompts = [[i * 7 % 500 for i in range(start, start + 90)] for start in range(0, 60, 10)]
    llm.generate(prompts, SamplingParams(temperature=0, max_tokens=60, ignore_eos=True), use_tqdm=False)
    found = values(metrics)
    assert found["pagedlit_events_total", ("preempted",)] > 0, "the pool was to run short"
    num_cached = found["pagedlit_events_total", ("published",)] - found["pagedlit_events_total", ("evicted",)]
    assert num_cached == found["pagedlit_prefix_cache_blocks", ()] == llm.stats().num_cached_blocks
    metrics.close()


def test_two_metrics_do_not_meet_and_closing_leaves_no_trace(llm: LLM) -> None:
    first, second = Metrics(llm), Metrics(llm)
    llm.generate([1, 2, 3], SamplingParams(max_tokens=2), use_tqdm=False)
    first.close()
    llm.generate([1, 2, 3], SamplingParams(max_tokens=2), use_tqdm=False)
    second.close()
    finished = [sum(v for (name, _), v in values(each).items() if name == "pagedlit_request_success_total") for each in (first, second)]
    assert finished == [1, 2] and not llm.observers and not llm.engine.scheduler.events
