"""Pictures of random states: well-formed, complete, inside their panel, deterministic, and harmless to what they show."""

import os
import random
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from array import array
from pathlib import Path

import pytest

from pagedlit.memory.allocator import BlockAllocator, Event
from pagedlit.memory.block_table import BlockTable
from pagedlit.memory.copy_on_write import fork
from pagedlit.memory.prefix_cache import PrefixCache
from pagedlit.serving.engine import Engine, ToyRunner, build_engine, toy_text
from pagedlit.serving.sequence import SamplingParams
from pagedlit.serving.simulator import simulate
from pagedlit.serving.workload import synthetic
from pagedlit.viz import (
    PALETTE,
    Moment,
    Span,
    Stepper,
    Svg,
    draw_areas,
    draw_bars,
    draw_block_table,
    draw_chart,
    draw_engine,
    draw_memory,
    draw_pool,
    draw_report,
    draw_timeline,
    draw_tree,
    engine_holders,
    engine_text,
    fit,
    largest_hole,
    look_at,
    moments_of,
    pool_text,
    stack_up,
    text_width,
)

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = ['<script>alert("1")</script>', "a&b;'\"", "\x00\x1b[31m\ud800\ufffe", "漢字" * 40, "x" * 500, "", " \n\t", "]]>", "-->"]


def random_engine(seed: int) -> tuple[Engine, list[Event]]:
    """An engine in the middle of its work, and what has happened so far."""
    rng = random.Random(seed)
    num_blocks, size = rng.choice([4, 13, 64, 200, 600]), rng.choice([1, 3, 16])
    engine = build_engine(ToyRunner(num_blocks, size), num_blocks, size, max_num_batched_tokens=rng.choice([5, 40]), max_num_seqs=8)
    events: list[Event] = []
    engine.scheduler.events.subscribe(events.append)
    limit = min(60, num_blocks * size - 1)
    for _ in range(rng.randrange(12)):
        salt, prompt = rng.choice([None, None, "<tenant> & co"]), [rng.randrange(2) for _ in range(rng.randint(1, limit))]
        engine.add_request(prompt, SamplingParams(temperature=0, max_tokens=rng.randint(1, 12), cache_salt=salt))
    for _ in range(rng.randrange(40)):
        engine.step()
        if engine.sequences and rng.random() < 0.1:
            engine.fork(rng.choice(list(engine.sequences)))
        if engine.sequences and rng.random() < 0.05:
            engine.abort(rng.choice(list(engine.sequences)))
    return engine, events


def pictures_of(engine: Engine, events: list[Event]) -> list[Svg]:
    """All that can be drawn of an engine."""
    tables = [seq for seq in engine.scheduler.running if seq.table is not None]
    return [
        draw_engine(engine, title="An engine"),
        draw_engine(engine, columns=7),
        draw_tree(engine.scheduler.cache, toy_text),
        draw_tree(engine.scheduler.cache, title="Numbers"),
        draw_timeline(events, title="A timeline"),
        *(draw_block_table(seq.table, list(toy_text(seq.token_ids)), seq.num_computed_tokens) for seq in tables),
        *(draw_block_table(seq.table) for seq in tables),
    ]


def block_ids_in(picture: Svg) -> list[int]:
    """The blocks that a picture shows."""
    return [int(node.get("data-block")) for node in ElementTree.fromstring(str(picture)).iter() if node.get("data-block")]


def fills_in(picture: Svg, block_id: int) -> list[tuple[str, float]]:
    """Palette colours in a block's cell, with their widths."""
    cell = next(node for node in ElementTree.fromstring(str(picture)).iter() if node.get("data-block") == str(block_id))
    return [(rect.get("fill"), float(rect.get("width"))) for rect in cell.iter(f"{SVG}rect") if rect.get("fill") in PALETTE]


def extents(node: ElementTree.Element, x: float = 0, y: float = 0, size: float = 11):
    """Left, right, top and bottom of every rectangle and text."""
    dx, dy = map(float, re.findall(r"-?[\d.]+", node.get("transform", "0 0")))
    x, y, size = x + dx, y + dy, float(node.get("font-size", size))
    if node.tag == f"{SVG}rect":
        left, top = x + float(node.get("x")), y + float(node.get("y"))
        yield left, left + float(node.get("width")), top, top + float(node.get("height"))
    if node.tag == f"{SVG}text":
        width, at = text_width(node.text or "", size), x + float(node.get("x"))
        left = at - {"middle": width / 2, "end": width}.get(node.get("text-anchor"), 0)
        yield left, left + width, y + float(node.get("y")) - size, y + float(node.get("y"))
    for child in node:
        yield from extents(child, x, y, size)


def check(picture: Svg) -> None:
    """What holds for every picture."""
    text = str(picture)
    root = ElementTree.fromstring(text)
    width, height = int(root.get("width")), int(root.get("height"))
    assert root.tag == f"{SVG}svg" and root.get("role") == "img" and root.get("viewBox") == f"0 0 {width} {height}"
    assert root[0].tag == f"{SVG}title" and root[0].text and root[1].tag == f"{SVG}desc" and root[1].text
    assert not re.search(r"""\s(id|class|href)=|url\(|<style|<script|["\s]-?(nan|inf)["\s]""", text), "ids and style sheets clash, nan is no number"
    for left, right, top, bottom in extents(root):
        assert -0.5 <= left <= right + 0.01 and right <= width + 1 and -0.5 <= top and bottom <= height + 0.5


@pytest.mark.parametrize("seed", range(60))
def test_pictures_of_random_engines(seed):
    engine, events = random_engine(seed)
    for picture in pictures_of(engine, events):
        check(picture)
    assert block_ids_in(draw_engine(engine)) == list(range(engine.scheduler.cache.num_blocks))
    assert sorted(block_ids_in(draw_tree(engine.scheduler.cache))) == sorted(engine.scheduler.cache.nodes)


@pytest.mark.parametrize("seed", range(10))
def test_drawing_changes_nothing_and_repeats_itself(seed):
    (engine, events), (other, other_events) = random_engine(seed), random_engine(seed)
    first = [str(picture) for picture in pictures_of(engine, events)]
    assert first == [str(picture) for picture in pictures_of(engine, events)]
    assert first == [str(picture) for picture in pictures_of(other, other_events)], "the same state, another picture"
    engine.check_invariants()
    assert [list(s.token_ids) for s in engine.drain()] == [list(s.token_ids) for s in other.drain()]


def test_pictures_do_not_depend_on_the_hash_seed():
    code = """
from test_viz import *
print([str(picture) for seed in (3, 8) for picture in pictures_of(*random_engine(seed))])
"""
    here = Path(__file__).parent
    outputs = set()
    for hash_seed in ("1", "2"):
        env = os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)])}
        outputs.add(subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, check=True).stdout)
    assert len(outputs) == 1


@pytest.mark.parametrize("num_blocks", [1, 4, 16, 20, 64, 128, 129, 512, 1024, 1500])
@pytest.mark.parametrize("columns", [None, 1, 16, 100])
def test_every_block_of_a_pool_is_drawn_once(num_blocks, columns):
    pool = BlockAllocator(num_blocks)
    picture = draw_pool(pool, {"a": pool.allocate(1 + num_blocks // 2)}, columns=columns)
    check(picture)
    assert block_ids_in(picture) == list(range(num_blocks))


def test_a_colour_depends_on_the_place_of_the_label_alone():
    pool = BlockAllocator(16)
    tables = {name: BlockTable(pool, 4) for name in "abc"}
    for table in tables.values():
        table.grow(8)
    before = draw_pool(pool, tables)
    tables["a"].release()
    after = draw_pool(pool, tables)
    assert fills_in(before, 4) == fills_in(after, 4) and fills_in(after, 4)[0][0] == PALETTE[2]
    assert fills_in(before, 0)[0][0] == PALETTE[0] and fills_in(after, 0) == []


def test_a_sequence_keeps_its_colour_from_step_to_step():
    engine = build_engine(ToyRunner(64, 4), 64, 4)
    for i in range(5):
        engine.add_request([i] * 9, SamplingParams(temperature=0, max_tokens=3 + 4 * i))
    while engine.sequences:
        engine.step()
        for seq in engine.scheduler.running:
            assert {color for color, _ in fills_in(draw_engine(engine), seq.table.block_ids[0])} == {PALETTE[seq.seq_id]}


def test_lanes_show_who_holds_a_block_and_how_full_it_is():
    pool = BlockAllocator(8)
    a = BlockTable(pool, 4)
    a.grow(6)
    b = fork(a)
    picture = draw_pool(pool, {"a": a, "b": b}, {"a": 5, "b": 6})
    (color_a, width_a), (color_b, width_b) = fills_in(picture, 1)
    assert (color_a, color_b) == PALETTE[:2] and width_b == pytest.approx(2 * width_a, abs=0.02)
    assert "held by a (25% full), b (50% full)" in str(picture) and "×2" in str(picture)
    assert "not shown here" in str(draw_pool(pool, {})) and "held by others" in str(draw_pool(pool, {}))


def test_a_pool_without_reference_counts_is_drawn_from_its_tables():
    class Naive:
        num_blocks = 6

    picture = draw_pool(Naive(), {"a": [0, 3], "b": [3]})
    check(picture)
    assert "6 blocks: 2 held (1 shared), 4 free" in str(picture)


def test_the_cache_is_no_holder():
    cache = PrefixCache(BlockAllocator(8), block_size=4)
    tokens = array("i", range(6))
    table = cache.acquire(cache.match(tokens))
    table.grow(6)
    cache.publish(cache.match(tokens).cursor, table, tokens, 6, with_tail=True)
    views = look_at(cache, [])
    assert [(view.state, view.num_holders, view.cached) for view in views[:3]] == [("held", 1, 1.0), ("held", 1, 0.5), ("free", 0, None)]
    table.release()
    picture = draw_pool(cache, {})
    check(picture)
    assert "8 blocks: 0 held, 2 cached and idle, 6 free" in str(picture)
    check(draw_tree(cache))


@pytest.mark.parametrize("label", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_labels_are_text(label):
    pool = BlockAllocator(40)
    table = BlockTable(pool, 4)
    table.grow(10)
    tokens = [label] * 10
    span = Span(label, 0, 10, 3)
    pictures = [
        draw_pool(pool, {label: table, "x": pool.allocate(2)}, {label: 10}, title=label),
        draw_block_table(table, tokens, title=label),
        draw_memory({label: [span]}, 20, title=label),
        draw_chart({label: [(1, 2), (3, 4)]}, label, label, title=label),
        draw_areas({label: [(1, 2), (3, 4)]}, label, label, title=label),
        draw_bars({label: {label: 3, "x": 2}}, {label: 4}, label, label, title=label),
    ]
    for picture in pictures:
        check(picture)
        tags = {node.tag.removeprefix(SVG) for node in ElementTree.fromstring(str(picture)).iter()}
        assert tags <= {"svg", "title", "desc", "g", "rect", "path", "circle", "text"}
    ElementTree.fromstring(Stepper(pictures, [label] * 6)._repr_html_())
    text = pool_text(pool, {label: table}, columns=30, color=False)
    assert all(len(line) <= 30 for line in text.split("\n")) and not re.search(r"[\x00-\x09\x0b-\x1f]", text)


def test_texts_are_cut_to_fit():
    for text in HOSTILE:
        for width in (0, 5, 40, 300):
            cut = fit(text, width, 11)
            assert text_width(cut, 11) <= width and (cut == text or cut == "" or cut.endswith("…"))


def test_block_tables_of_all_sizes():
    for num_blocks, num_tokens, size in [(128, 0, 4), (8, 0, 4), (8, 32, 4), (16, 60, 4), (64, 900, 16), (5000, 70000, 16), (40, 40, 1)]:
        pool = BlockAllocator(num_blocks)
        table = BlockTable(pool, size)
        table.grow(num_tokens)
        picture = draw_block_table(table, title="A table")
        check(picture)
        shown = block_ids_in(picture)
        assert len(shown) == len(set(shown)) and set(list(table.block_ids)[:6]) <= set(shown)


def test_a_very_deep_tree_is_drawn_without_recursion():
    cache = PrefixCache(BlockAllocator(3000), block_size=1)
    tokens = array("i", [1] * 3000)
    table = cache.acquire(cache.match(tokens))
    table.grow(3000)
    cache.publish(cache.match(tokens).cursor, table, tokens, 3000)
    assert len(block_ids_in(draw_tree(cache))) == 3000


def test_empty_states():
    engine = build_engine(ToyRunner(4, 4), 4, 4)
    for picture in [*pictures_of(engine, []), draw_chart({}), draw_memory({}, 8), draw_chart({"flat": [(1, 0), (2, 0)]}, log_x=True)]:
        check(picture)
    for picture in [draw_areas({}), draw_areas({"a": []}), draw_bars({}), draw_bars({"a": {}}, {"b": 1}), draw_report(simulate([]))]:
        check(picture)
    assert engine_text(engine, color=False) == "····\n· free"


@pytest.mark.parametrize("given", [True, False], ids=["step given", "step inferred"])
def test_timeline_files_events_under_their_steps(given):
    events = [
        Event("scheduled", seq_id=0, num_tokens=8, step=0),
        Event("scheduled", seq_id=1, num_tokens=4, step=0),
        Event("preempted", seq_id=1, step=1 if given else None),
        Event("scheduled", seq_id=0, num_tokens=1, step=1),
        Event("finished", seq_id=0, step=1 if given else None),
        Event("evicted", (3,), num_tokens=4),
        Event("hit", seq_id=1, num_tokens=3),
        Event("scheduled", seq_id=1, num_tokens=1, step=2),
    ]
    assert moments_of(events) == {
        (0, 0): Moment(8), (1, 0): Moment(4), (1, 1): Moment(0, mark="preempted"), (0, 1): Moment(1, mark="finished"), (1, 2): Moment(1, 3),
    }  # fmt: skip
    assert moments_of(events)[1, 2].is_prefill and not moments_of(events)[0, 1].is_prefill
    check(draw_timeline(events))


@pytest.mark.parametrize("seed", range(10))
def test_timeline_counts_what_the_engine_ran(seed):
    engine, events = random_engine(seed)
    moments = moments_of(events)
    assert sum(moment.num_tokens for moment in moments.values()) == sum(e.num_tokens for e in events if e.kind == "scheduled")
    assert sum(moment.num_hit for moment in moments.values()) == sum(e.num_tokens for e in events if e.kind == "hit")
    assert max((step for _, step in moments), default=-1) <= engine.scheduler.num_steps


def test_memory_and_its_largest_hole():
    spans = [Span("b", 6, 4, 1), Span("a", 0, 4, 4)]
    assert largest_hole(spans, 12) == 2 and largest_hole(spans, 20) == 10 and largest_hole([], 7) == 7
    picture = draw_memory({"": spans, "later": spans[:1]}, 12)
    check(picture)
    assert "5 used, 3 reserved and empty, 4 free, the largest hole 2" in str(picture)


@pytest.mark.parametrize("points", [[(1, 0.001)], [(1, 5), (256, 7e6)], [(2, -3), (4, 8)], [(x, x * x) for x in range(1, 300)]])
@pytest.mark.parametrize("log_x", [False, True])
def test_charts(points, log_x):
    check(draw_chart({"one": points, "two": points[::2]}, "x", "y", log_x=log_x, title="A chart"))


def test_areas_stand_on_each_other():
    series = {"a": [(1, 2), (2, 3)], "b": [(1, 10), (2, 0)]}
    assert stack_up(series) == {"a": [(1, 2), (2, 3)], "b": [(1, 12), (2, 3)]}
    check(draw_areas(series, "x", "y", log_x=True, title="Areas"))
    with pytest.raises(ValueError):
        draw_areas({"a": [(1, 2)], "b": [(1, 2), (2, 3)]})


def test_bars_are_as_long_as_they_say():
    picture = draw_bars({"one": {"p": 10, "q": 30}, "two": {"p": 20}}, {"two": 40, "nobody": 35}, "x", "elsewhere", "Bars")
    check(picture)
    root = ElementTree.fromstring(str(picture))
    bars = {node.find(SVG + "title").text: node.find(SVG + "rect") for node in root.iter(SVG + "g") if node.find(SVG + "rect") is not None
            and node.find(SVG + "title") is not None}  # fmt: skip
    widths = {name: float(rect.get("width")) for name, rect in bars.items()}
    assert widths["q: 30"] == pytest.approx(3 * widths["p: 10"], abs=0.1) and widths["p: 20"] == pytest.approx(2 * widths["p: 10"], abs=0.1)
    assert [node.find(SVG + "title").text for node in root.iter(SVG + "g") if "elsewhere" in (node.findtext(SVG + "title") or "")] == ["elsewhere: 40"]


def test_a_report_is_drawn():
    report = simulate(synthetic(40, 3.0, "alpaca"), num_blocks=300)
    picture = draw_report(report, "A run")
    check(picture)
    names = {node.text for node in ElementTree.fromstring(str(picture)).iter(SVG + "text")}
    assert {"used", "internal", "cached", "free", "running", "waiting", "minutes"} <= names and "reserved" not in names


@pytest.mark.parametrize("columns", [16, 33, 64])
@pytest.mark.parametrize("seed", range(10))
def test_text_form(seed, columns):
    engine, _ = random_engine(seed)
    plain, colored = (engine_text(engine, columns, color) for color in (False, True))
    assert "\x1b" not in plain and re.sub(r"\x1b\[[\d;]*m", "", colored) == plain
    assert all(len(line) <= columns for line in plain.split("\n"))
    num_blocks = engine.scheduler.cache.num_blocks
    rows = -(-num_blocks // columns)
    cells = "".join(plain.split("\n")[:rows])
    views = look_at(engine.scheduler.cache, engine_holders(engine))
    assert len(cells) == num_blocks and cells.count("·") == sum(view.state == "free" for view in views)


def test_text_form_of_shared_and_partly_filled_blocks():
    pool = BlockAllocator(8)
    a = BlockTable(pool, 4)
    a.grow(6)
    b = fork(a)
    pool.allocate(1)
    c = BlockTable(pool, 4)
    c.grow(6)
    text = pool_text(pool, {"one": a, "two": b, "three": c}, {"three": 5}, color=False)
    assert text.split("\n")[0] == "22?Cc···"
    assert "A one  B two  C three  2 shared by 2, 3, ...  ? held by others" in text


def test_a_stepper_holds_every_frame(tmp_path):
    pool = BlockAllocator(4)
    frames = [draw_pool(pool, {"a": pool.allocate(1)}) for _ in range(3)]
    stepper = Stepper(frames, ["one", "two", "<three>"])
    root = ElementTree.fromstring(stepper._repr_html_())
    shown = [node.get("style") for node in root.iter("div") if node.get("data-frame")]
    assert len(shown) == 3 and ["visible" in style for style in shown] == [True, False, False]
    assert "http" not in stepper._repr_html_().replace("http://www.w3.org/2000/svg", ""), "nothing is fetched"
    assert frames[0].save(tmp_path / "frame.svg").read_text(encoding="utf-8") == str(frames[0]) == frames[0]._repr_svg_()
    assert repr(stepper) == "Stepper(3 frames)" and repr(frames[0]).startswith("Svg(")
    for bad in (lambda: Stepper([]), lambda: Stepper(frames, ["one"])):
        with pytest.raises(ValueError, match="frames"):
            bad()
