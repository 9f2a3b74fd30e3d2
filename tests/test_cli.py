"""The commands: what they print where, what they end with, and how fast they begin."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub.utils import are_progress_bars_disabled
from transformers.utils import logging
from typer.testing import CliRunner

import pagedlit
from pagedlit import cli
from pagedlit.cli import Demo, app, last_words, load, progress_line, run_step, summary
from pagedlit.serving.sequence import SamplingParams
from pagedlit.tiny import MODEL_PATH, questions

ROOT = Path(__file__).parent.parent
ESCAPE = "\x1b"
QUESTIONS = [each["question"] for each in questions()]
ANSWERS = [each["answer"] for each in questions()]


def invoke(*args: str):
    """Run a command in this process, its output captured as through a pipe."""
    return CliRunner(env={"FORCE_COLOR": None, "COLUMNS": "200"}).invoke(app, list(args))


def process(*args: str, **options):
    """Run a command in a process of its own."""
    env = {k: v for k, v in os.environ.items() if k not in ("FORCE_COLOR", "CLICOLOR_FORCE", "HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE")}
    env |= {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", "from pagedlit.cli import main; main()", *args]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, **options)


@pytest.fixture(scope="module")
def llm():
    return pagedlit.LLM(num_blocks=128)


@pytest.fixture
def small_model(llm, monkeypatch):
    """The commands without the second that loading takes."""
    monkeypatch.setattr(cli, "load", lambda model, num_blocks=None, kv_cache_dtype="auto": llm)


# the frame


def test_help_and_version_load_no_torch():
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom pagedlit.cli import app\n"
        "for args in (['--help'], ['--version'], ['generate', '--help'], ['demo', '--help'], []):\n"
        "    result = CliRunner().invoke(app, args)\n    assert result.output, args\n"
        "print([name for name in ('torch', 'transformers', 'numpy', 'huggingface_hub') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "[]", "")


def test_version():
    result = invoke("--version")
    assert (result.exit_code, result.output) == (0, pagedlit.__version__ + "\n")


def test_help_names_the_commands():
    result = invoke("--help")
    assert result.exit_code == 0 and "generate" in result.output and "demo" in result.output
    assert "generate" in invoke().output, "without a command: the same"


@pytest.mark.parametrize(
    "args", [["no-such-command"], ["generate"], ["generate", "a", "--no-such-option"], ["demo", "--num-questions", "0"], ["demo", "--num-blocks", "-1"]], ids=" ".join
)
def test_wrong_usage(args):
    result = invoke(*args)
    assert result.exit_code == 2 and "Usage" in result.stderr


@pytest.mark.parametrize("option", [("--max-tokens", "0"), ("--temperature", "-1"), ("--temperature", "nan")], ids=" ".join)
def test_wrong_parameters_are_found_before_a_model_is_loaded(option, monkeypatch):
    monkeypatch.setattr(cli, "load", lambda *args: pytest.fail("a model was loaded"))
    result = invoke("generate", "a", *option)
    assert result.exit_code == 2 and option[0][2:].replace("-", "_") in result.stderr


# generate


def test_generate_answers(small_model):
    result = invoke("generate", QUESTIONS[0])
    assert (result.exit_code, result.stdout, result.stderr) == (0, ANSWERS[0] + "\n", "")


def test_several_prompts_are_answered_in_their_order(small_model):
    result = invoke("generate", *QUESTIONS[:5])
    assert (result.exit_code, result.stdout) == (0, "".join(answer + "\n" for answer in ANSWERS[:5]))


def test_generate_options(small_model, llm):
    assert invoke("generate", QUESTIONS[0], "--max-tokens", "3").stdout == llm.tokenizer.decode(llm.tokenizer(ANSWERS[0]).input_ids[1:4]) + "\n"
    hot = ("generate", QUESTIONS[0], "--temperature", "5", "--max-tokens", "8", "--seed")
    assert invoke(*hot, "1").stdout == invoke(*hot, "1").stdout != invoke(*hot, "2").stdout
    raw = llm.generate(QUESTIONS[0], SamplingParams(temperature=0, max_tokens=64), use_tqdm=False)[0].outputs[0].text
    assert invoke("generate", QUESTIONS[0], "--no-chat").stdout == raw + "\n"


def test_a_prompt_that_cannot_be_served_fails_alone(small_model):
    result = invoke("generate", QUESTIONS[0], "too long " * 2000, QUESTIONS[1])
    assert result.exit_code == 1 and result.stdout == f"{ANSWERS[0]}\n{ANSWERS[1]}\n"
    assert result.stderr.startswith("error: 'too long too long") and "max_model_len=2048" in result.stderr and result.stderr.count("\n") == 1


def test_answers_grow_as_they_are_generated(small_model, llm, monkeypatch):
    written = []
    monkeypatch.setattr(cli.typer, "echo", lambda text="", nl=True, err=False: written.append(text))
    invoke("generate", QUESTIONS[0], QUESTIONS[1])
    end = written.index("")
    assert end > 5 and "".join(written[:end]) == ANSWERS[0]
    assert "".join(written[end:]) == ANSWERS[1] and len(written) - end < end, "the second was written meanwhile"


@pytest.mark.parametrize("model", ["/no/such/folder", "not a name"])
def test_a_model_that_cannot_be_loaded(model, monkeypatch):
    result = invoke("generate", "a", "--model", model)
    assert result.exit_code == 1 and result.stdout == ""
    assert result.stderr.startswith(f"error: cannot load {model}: ") and "Traceback" not in result.output


def test_generate_with_a_model_of_ones_own():
    result = invoke("generate", QUESTIONS[0], "--model", str(MODEL_PATH))
    assert (result.exit_code, result.stdout) == (0, ANSWERS[0] + "\n")


def test_ctrl_c_ends_without_a_traceback(monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "load", interrupted)
    result = invoke("generate", "a")
    assert result.exit_code != 0 and "Traceback" not in result.output


def test_loading_leaves_the_bars_of_downloads_as_they_were(monkeypatch):
    before = are_progress_bars_disabled()
    load(None, 8)
    assert not logging.is_progress_bar_enabled() and are_progress_bars_disabled() == before


# demo


def run_demo(llm, num_questions: int, next_question: str | None = None) -> Demo:
    run = Demo(llm, QUESTIONS[:num_questions], next_question)
    while run.is_going:
        run_step(run)
    return run


def test_demo_answers_all_questions_at_once():
    run = run_demo(pagedlit.LLM(num_blocks=128), 10, QUESTIONS[10])
    assert [output.outputs[0].text for output in run.outputs.values()] != [] and len(run.asked) == 11
    for request_id, question in run.asked.items():
        assert run.outputs[request_id].outputs[0].text == ANSWERS[QUESTIONS.index(question)]
    assert run.peak_running >= 8 and run.llm.stats().num_free_blocks == 128


def test_demo_shows_what_was_counted():
    run = run_demo(pagedlit.LLM(num_blocks=128), 10, QUESTIONS[10])
    stats, rows = run.llm.stats(), dict(summary(run))
    assert list(rows) == ["requests", "KV memory", "reserved", "prefix hits", "next turn", "copies", "speed"]
    assert rows["requests"].startswith(f"11 answered, {run.peak_running} at a time")
    assert rows["KV memory"].startswith(f"{run.peak_blocks * 16:,} token slots") and rows["reserved"].startswith(f"{run.peak_running * 2048:,} slots")
    token_bytes = run.llm.runner.kv_cache.num_bytes / (128 * 16)
    assert f"({run.peak_blocks * 16 * token_bytes / 1e6:.2f} MB)" in rows["KV memory"]
    assert rows["prefix hits"].startswith(f"{stats.num_cached_tokens:,} of {stats.num_prompt_tokens:,}") and stats.num_cached_tokens > 1000
    turn = run.outputs[run.next_turn]
    assert rows["next turn"].startswith(f"follow-up 11: {turn.num_cached_tokens} of its {len(turn.prompt_token_ids)}")
    assert turn.num_cached_tokens > len(turn.prompt_token_ids) - 20, "all but the new question"
    assert rows["copies"].startswith(f"{stats.num_copies} ") and f"{stats.num_generated_tokens} generated" in rows["speed"]


def test_demo_with_a_pool_that_is_too_small_for_all():
    llm = pagedlit.LLM(num_blocks=24)
    run = run_demo(llm, 10)
    assert llm.stats().num_preemptions > 0
    assert [run.outputs[request_id].outputs[0].text for request_id in run.asked] == ANSWERS[:10]
    assert "next turn" not in dict(summary(run))


def test_demo_options():
    result = invoke("demo", "--num-questions", "1", "--num-blocks", "32")
    assert result.exit_code == 0 and ANSWERS[0] in result.stdout and "2 answered, 1 at a time" in result.stdout
    result = invoke("demo", "--num-blocks", "2")
    assert result.exit_code == 1 and "max_model_len=32" in result.stderr and "Traceback" not in result.output


def test_demo_in_a_pipe():
    done = process("demo")
    assert (done.returncode, done.stderr) == (0, ""), "no bars, no warnings"
    assert ESCAPE not in done.stdout and "\r" not in done.stdout
    assert all(answer in done.stdout.splitlines() for answer in (f"   {answer}" for answer in ANSWERS[:11])), "a line for each"
    assert re.search(r"^   step 8: 1 .*  2 .*  8 ", done.stdout, re.MULTILINE)
    assert done.stdout.index("step 8:") < done.stdout.index(ANSWERS[4]) < done.stdout.index("The pool when it was fullest")
    assert all(f"{label}  " in done.stdout for label in ("requests", "KV memory", "reserved", "prefix hits", "next turn", "copies", "speed"))
    assert not any(line.endswith(" ") for line in done.stdout.splitlines() if not line.startswith("   step"))


@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal")
def test_demo_on_a_terminal():
    import pty

    output = bytearray()

    def read(fd: int) -> bytes:
        output.extend(data := os.read(fd, 65536))
        return data

    code = f"import os, sys; os.environ.update(TERM='xterm-256color', COLUMNS='90', LINES='40', HF_HUB_OFFLINE='1'); sys.path.insert(0, {str(ROOT)!r})"
    stdout = os.dup(1)
    with open(os.devnull, "wb") as devnull:
        os.dup2(devnull.fileno(), 1)  # pty.spawn copies what it reads to the standard output
        try:
            status = pty.spawn([sys.executable, "-c", code + "; from pagedlit.cli import main; main()", "demo", "--num-questions", "3"], read)
        finally:
            os.dup2(stdout, 1)
            os.close(stdout)
    text = output.decode()
    assert os.waitstatus_to_exitcode(status) == 0 and "Loading weights" not in text
    assert ESCAPE + "[1A" in text and text.count(QUESTIONS[0]) > 5, "it was redrawn"
    assert text.count(ESCAPE + "[?25l") == text.count(ESCAPE + "[?25h") == 1, "the cursor is back"
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    assert "The pool when it was fullest (3 requests running)" in plain and "4 answered" in plain


def test_last_words():
    assert last_words("a block table", 20) == "a block table"
    assert last_words("a block table lists", 8) == "…lists" and last_words("a block table lists", 14) == "…table lists"
    assert last_words("", 5) == "" and last_words("interchangeable", 4) == "…able"


def test_progress_line():
    run = Demo(pagedlit.LLM(num_blocks=32), QUESTIONS[:3])
    for _ in range(6):
        run_step(run)
    line = progress_line(run)
    assert re.fullmatch(r"   step \d+: 1 .+  2 .+  3 .+", line) and len(line) < 130
    while run.is_going:
        run_step(run)
    assert re.fullmatch(r"   step \d+: ", progress_line(run))
