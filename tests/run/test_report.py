"""The report page: whole, self-contained, and true to the files that it is made from."""

import math
import re
from html.parser import HTMLParser

import pytest

from internlm2.config import WandbConfig
from internlm2.run.directory import RunDirectory
from internlm2.run.figures import Series, _binary, _decimal, line_figure, smooth, thin
from internlm2.run.metrics import Metrics
from internlm2.run.provenance import record_end, record_start
from internlm2.run.report import write_report, write_stage_report
from internlm2.run.stage_summary import read_stage

FIGURE = {
    "title": "Loss by position",
    "x_label": "position",
    "y_label": "nats",
    "series": [{"label": "4k <model>", "x": [1, 2], "y": [3.0, 2.0]}],
}


class Page(HTMLParser):
    """Checks that tags balance; collects text and attributes."""

    VOID = ("meta", "br", "link")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += data


def make_stage(path, steps=1500, *, extras=True, finished=True) -> RunDirectory:
    run = RunDirectory(path)
    metrics = Metrics(run, WandbConfig(mode="disabled", project="x"), config={})
    record_start(run, step=0, config="lr: 1 # <b>\n", command=["train.py", "name=<x>"])
    for step in range(1, steps + 1):
        values = {"loss": 8 * math.exp(-step / 500) + 2, "grad_norm": 1.0 + step % 7, "lr": 3e-4, "applied": True}
        if step == 10:
            values |= {"loss": math.nan, "grad_norm": math.nan, "applied": False, "reason": "the loss is nan"}
        if step % 500 == 0:
            values["validation"] = {"code": {"loss": 3.0 - step / 1500}, "prose": {"loss": 4.0}}
        timing = {"seconds": 2.0, "tokens": 4096, "tokens_per_second": 2048.0, "mfu": 0.25, "memory_bytes": 1 << 30}
        metrics.record(step, values, timing)
    metrics.close()
    if extras:
        run.write_json("evaluation/position.json", FIGURE)
        run.write_json("data.json", {"rows": [{"source": "code <&>", "tokens": 1234567}]})
        run.write_json("handover.json", [{"key": "rope_base", "inherited": 5e4, "used": 1e6, "note": "changed"}])
        run.samples.mkdir()
        (run.samples / "prompt.txt").write_text("<script>alert(1)</script>")
    if finished:
        record_end(run, step=steps, status="finished")
    return run


def test_stage_page_shows_what_the_files_say(tmp_path):
    run = make_stage(tmp_path / "tiny" / "pretrain_4k")
    text = write_stage_report(run.path).read_text()
    page = Page(text)
    assert page.tags.count("svg") == 6  # loss, norm, lr, tokens/s, validation, position
    assert "script" not in page.tags
    for words in (
        "tiny / pretrain_4k",
        "finished",
        "in 1,500 steps and 6.14M tokens, 50 min 0 s of training",
        "25.0%",
        "1,234,567",
        "code <&>",
        "4k <model>" if FIGURE["series"][0]["label"] in page.words else "Loss by position",
        "<script>alert(1)</script>",
        "rope_base",
        "Steps without an update: 1",
        "the loss is nan",
        "train.py name=<x>",
        "lr: 1 # <b>",
        "MFU = (6 * P * tokens",
    ):
        assert words in page.words, words
    final = sum(8 * math.exp(-step / 500) + 2 for step in range(1481, 1501)) / 20
    assert f"to {final:.3f} in" in page.words


def test_page_needs_no_network_and_takes_its_colours_from_the_style_sheet(tmp_path):
    text = write_stage_report(make_stage(tmp_path / "tiny" / "pretrain_4k").path).read_text()
    links = [value for name, value in Page(text).attributes if name in ("href", "src", "xlink:href")]
    assert all(link.startswith("#") for link in links)
    assert "http" not in text
    assert "@import" not in text
    assert "prefers-color-scheme: dark" in text
    drawings = "".join(re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL))
    assert re.findall(r"#[0-9a-f]{6}", drawings) == []
    assert "var(--s1)" in drawings
    assert "var(--ink-soft)" in drawings
    assert "font-family" not in drawings
    assert len(text) < 150_000


def test_run_page_joins_the_stages_in_the_order_of_their_start(tmp_path):
    first = make_stage(tmp_path / "tiny" / "z_first", steps=40)
    make_stage(tmp_path / "tiny" / "a_second", steps=20, extras=False, finished=False)
    history = first.provenance.read_text()
    first.provenance.write_text(re.sub(r'"time": "\d{4}', '"time": "2001', history))
    page = Page(write_report(tmp_path / "tiny").read_text())
    assert page.words.index("z_first") < page.words.index("a_second")
    assert "2 stages, 246k tokens, 2 min 0 s of training." in page.words
    assert "running or killed" in page.words
    assert [v for n, v in page.attributes if n == "id" and "_" in v] == ["z_first", "a_second"]
    chosen = Page(write_report(tmp_path / "tiny", ["a_second", "missing"]).read_text())
    assert "z_first" not in chosen.words


def test_a_run_without_stages_is_one_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no stage with a metrics"):
        write_report(tmp_path)


def test_an_empty_stage_and_damaged_files_still_make_a_page(tmp_path):
    run = RunDirectory(tmp_path / "tiny" / "stage")
    run.evaluation.mkdir()
    (run.evaluation / "broken.json").write_text("{")
    run.write_json("evaluation/short.json", FIGURE | {"series": [{"label": "a", "x": [1], "y": []}]})
    run.write_json("evaluation/untitled.json", {"x_label": "x"})
    page = Page(write_stage_report(run.path).read_text())
    assert "No step has been recorded." in page.words
    assert "broken.json is no JSON" in page.words
    assert "short.json is no figure: series 'a' has 1 x and 0 y" in page.words
    assert "untitled.json is no figure: it has no title" in page.words


def test_summary_counts(tmp_path):
    stage = read_stage(make_stage(tmp_path / "s", steps=1000).path)
    assert (stage.steps, stage.tokens, stage.seconds) == (1000, 4_096_000, 2000.0)
    assert stage.typical("mfu") == 0.25
    assert stage.validation()["code"] == ([500, 1000], [3.0 - 1 / 3, 3.0 - 2 / 3])
    assert [record["step"] for record in stage.not_applied()] == [10]
    assert stage.column("loss")[9] is None


def test_smooth_has_no_lag_and_keeps_gaps():
    line = [float(i) for i in range(101)]
    assert smooth(line, 5.0)[50] == pytest.approx(50.0, abs=1e-6)
    assert smooth([2.0, None, 2.0], 1.0) == [2.0, None, 2.0]
    # weights 1, 1/2, 1/4 around the first point, by hand
    assert smooth([1.0, 3.0, 5.0], 1.0)[0] == pytest.approx((1.0 + 3.0 / 2 + 5.0 / 4) / 1.75)


def test_thin_keeps_peaks_ends_and_order():
    values = [0.0] * 10_000
    values[1234], values[8765] = 9.0, -9.0
    x, y = thin(list(range(10_000)), values, 200)
    assert len(x) <= 220
    assert x == sorted(set(x))
    assert {(1234, 9.0), (8765, -9.0)} <= set(zip(x, y, strict=True))
    assert x[-1] == 9999


def test_a_single_point_is_visible():
    drawing = line_figure([Series("a", [1], [2.0])], "x", "y", title="t")
    empty = line_figure([Series("a", [], [])], "x", "y", title="t")
    assert drawing.count("<use") == 1
    assert empty.count("<use") == 0


def test_labels_are_the_values_of_their_grid_lines():
    """Tick labels keep their decimals, and the coordinates that they stand at are evenly spaced like the values."""
    drawing = line_figure([Series("a", [1, 2, 3], [8.21, 8.29, 8.38])], "x", "y", title="t")
    labels = re.findall(r'<text[^>]*text-anchor: end[^>]*y="([\d.]+)"[^>]*>([\d.]+)</text>', drawing)
    heights, values = zip(*[(float(y), float(text)) for y, text in labels], strict=True)
    assert len(set(values)) == len(values) >= 3
    slopes = [(h - heights[0]) / (v - values[0]) for h, v in zip(heights[1:], values[1:], strict=True)]
    assert slopes == pytest.approx([slopes[0]] * len(slopes), rel=0.01)
    assert slopes[0] < 0, "up is more"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (8.25, "8.25"), (3e-5, "3e-5"), (2.4e-4, "2.4e-4"), (0.002, "0.002"), (12000, "12k"), (1.8e12, "1.8T")],
)
def test_decimal_labels(value, text):
    assert _decimal(value) == text


def test_lengths_are_named_in_powers_of_two():
    assert [_binary(value) for value in (512, 4096, 32768)] == ["512", "4k", "32k"]
