"""The command from end to end: files, pictures, the report, and one sentence for what cannot be."""

import json
import re
import shutil
from dataclasses import replace

import pytest

from internlm2.config import WandbConfig
from internlm2.config.compose import compose_evaluation
from internlm2.config.schema import RopeScalingConfig
from internlm2.evaluate.__main__ import main
from internlm2.evaluate.results import Headline, Result
from internlm2.evaluate.subject import load_subject, stage_of, weights_of
from internlm2.run.directory import RunDirectory
from internlm2.run.metrics import Metrics
from internlm2.run.provenance import record_end, record_start
from internlm2.run.stage_summary import figure_fault

KEYS = ["dtype=fp32", "threads=1", "suite.repeats=1", "suite.depths=[0,100]"]


def make_run(folder, export) -> RunDirectory:
    """A finished stage whose export is the small model."""
    run = RunDirectory(folder / "mine" / "pretrain_4k")
    run.write_config("name: mine\n")
    metrics = Metrics(run, WandbConfig(mode="disabled", project="x"), config={})
    record_start(run, step=0, config="name: mine\n", command=["train.py"])
    metrics.record(1, {"loss": 5.0, "grad_norm": 1.0, "lr": 1e-3}, {"seconds": 1.0, "tokens": 64})
    metrics.close()
    record_end(run, step=1, status="finished")
    shutil.copytree(export, run.export)
    return run


def test_needle_map_of_a_run_reaches_its_report(export, tmp_path, capsys):
    run = make_run(tmp_path, export)
    assert (
        main([str(run.export), "suite=needle", "suite.lengths=[96,160]", "suite.languages=[english,chinese]", *KEYS])
        == 0
    )
    for language in ("english", "chinese"):
        found = json.loads((run.evaluation / f"needle_{language}.json").read_text())
        assert figure_fault(found) is None
        assert found["heat_map"]["x"] == [96, 160]
        assert found["heat_map"]["values"] == [[0.0, 0.0], [0.0, 0.0]]
        assert found["settings"]["suite"]["repeats"] == 1
        assert (run.evaluation / f"needle_{language}.png").read_bytes().startswith(b"\x89PNG")
        records = [json.loads(line) for line in (run.evaluation / f"needle_{language}.jsonl").read_text().splitlines()]
        assert [record["tokens"] + 1 >= record["length"] - 12 for record in records] == [True] * 4
    for page in (run.report, run.path.parent / "report.html"):
        text = page.read_text()
        assert "Needle in a haystack, chinese" in text
        assert "needle, english, found within 256 tokens 0" in text or page == run.report
        assert not re.findall(r"#[0-9a-f]{6}", "".join(re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)))
    said = capsys.readouterr().out
    assert "Needle in a haystack, english" in said
    assert "depth (%)" in said


def test_another_rope_scaling(export):
    own = load_subject(str(export), compose_evaluation(["device=cpu"])).model.config
    keys = ["device=cpu", "rope_scaling.kind=dynamic", "rope_scaling.factor=3.0"]
    assert load_subject(str(export), compose_evaluation(keys)).model.config == replace(
        own, rope_scaling=RopeScalingConfig("dynamic", 3.0)
    )
    assert own.rope_scaling.kind == "none"


def test_held_out_text_of_one_s_own(export, tmp_path, capsys):
    text = tmp_path / "texts.jsonl"
    text.write_text('{"text": "The old gardener carried a basket of apples near the river."}\n' * 3)
    out = tmp_path / "out"
    keys = [
        f"+suite.texts.garden={text}",
        f"output={out}",
        "suite.seq_len=32",
        "suite.bins=4",
        "dtype=fp32",
        "threads=1",
    ]
    assert main([str(export), *keys]) == 0
    found = json.loads((out / "held_out.json").read_text())
    (row,) = found["rows"]
    assert row["source"] == "garden"
    assert row["bytes"] == 3 * len("The old gardener carried a basket of apples near the river.")
    assert row["bits per byte"] == pytest.approx(row["loss"] * row["tokens"] / 0.6931471805599453 / row["bytes"])
    by_position = json.loads((out / "held_out_by_position.json").read_text())
    assert figure_fault(by_position) is None
    assert not list(tmp_path.rglob("report.html"))
    assert "bits per byte" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["/nowhere/run"], "/nowhere/run does not exist"),
        (["EXPORT", "suite=needl"], "Did you mean suite=needle?"),
        (["EXPORT", "suite=needle", "suite.lenghts=[1]"], "Did you mean suite.lengths?"),
        (["EXPORT", "suite=needle", "suite.repeats=0"], "suite.repeats=0 must be at least 1"),
        (["EXPORT", "suite=needle", "suite.languages=[latin]"], "latin is not one of english, chinese"),
        (["EXPORT", "suite=needle", "suite.depths=[101]"], "101 must lie in 0..100"),
        (["EXPORT", "suite=needle", "suite.lengths=[8]"], "hold no haystack"),
        (["EXPORT", "suite=needle", "suite.lengths=[999999]"], "generation.kv_tokens"),
        (["EXPORT", "suite=held_out"], "is no run with a corpus of its own"),
        (["EXPORT", "suite=choices"], "suite.path is missing"),
        (["EXPORT", "suite=contamination"], "suite.test and suite.reference are both needed"),
    ],
)
def test_mistakes_are_one_sentence(export, capsys, words, message):
    assert main([str(export) if word == "EXPORT" else word for word in words]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.startswith("error: ")
    assert said.count("\n") == 1


def test_help_and_the_composed_config(capsys):
    assert main([]) == 0
    assert "suite=needle" in capsys.readouterr().out
    assert main(["any", "suite=gsm8k", "--cfg"]) == 0
    assert "max_new_tokens: 256" in capsys.readouterr().out


def test_what_a_path_means(export, tmp_path):
    run = make_run(tmp_path, export)
    assert stage_of(str(run.path)) == run.path
    assert stage_of(str(run.export)) == run.path
    assert stage_of(str(run.path.parent)) == run.path  # a whole run: its newest export
    assert weights_of(str(run.path.parent)) == str(run.export)
    assert stage_of(str(export)) is None
    assert weights_of("smollm2") == "smollm2"


def test_numbers_that_are_not_finite_become_null():
    from internlm2.config.compose import compose_evaluation

    result = Result("x", "X", rows=[{"a": float("nan")}], headline=[Headline("h", float("inf"), (0.0, float("nan")))])
    content = json.loads(json.dumps(result.content("m", compose_evaluation([])), allow_nan=False))
    assert content["rows"] == [{"a": None}]
    assert content["headline"][0]["value"] is None
    assert content["headline"][0]["interval"] == [0.0, None]
