"""The time model against published runs: on rows that its fit did not see, and by physics where nobody measured."""

import json
import math
import random
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from internlm2.plan.coefficients import FITTED, NAMES, Coefficients, fitted
from internlm2.plan.fitting import fit, left_out
from internlm2.plan.layout import Layout, Practice
from internlm2.plan.published import NETWORKS, errors, hardware_of, read_runs
from internlm2.plan.published_ppo import judge_ppo, read_ppo_runs
from internlm2.plan.speed import SpeedModel

RUNS = read_runs()


def test_table_has_every_run_once():
    assert len(RUNS) > 120
    assert {run.family for run in RUNS} == {"InternEvo", "llm-foundry"}
    assert all(run.tokens_per_second > 0 for run in RUNS)


def test_a_repeated_row_counts_once(tmp_path):
    lines = Path(read_runs.__globals__["TABLE"]).read_text().splitlines()
    file = tmp_path / "twice.csv"
    file.write_text("\n".join([lines[0], lines[1], lines[1].replace("InternEvo-tput", "InternEvo-flops")]) + "\n")
    assert len(read_runs(file)) == 1


def test_random_half_predicts_the_other():
    """A split that is none of those behind the printed band."""
    order = list(RUNS)
    random.Random(20_26).shuffle(order)
    judged = errors(order[1::2], fit(order[::2]))
    assert judged.median <= 0.03
    assert judged.p90 <= 0.09


@pytest.mark.parametrize("family", ["InternEvo", "llm-foundry"])
def test_a_source_that_the_fit_never_saw(family):
    assert left_out(RUNS, lambda run: run.family == family).median <= 0.12


def test_committed_coefficients_are_what_the_script_fits(monkeypatch, capsys):
    again = fit(RUNS)
    for name in NAMES:
        assert getattr(fitted().coefficients, name) == pytest.approx(getattr(again, name), rel=2e-3), name
    script = Path(__file__).resolve().parents[2] / "scripts" / "fit_plan.py"
    monkeypatch.setattr(sys, "argv", [str(script), "--judge", str(read_runs.__globals__["TABLE"])])
    runpy.run_path(str(script), run_name="__main__")
    printed = capsys.readouterr().out.splitlines()[0]
    assert f"median {errors(RUNS, fitted().coefficients).median:6.1%}" in printed


def test_printed_band_is_no_better_than_the_fit_deserves():
    """The stored errors on held-out rows exceed those on the rows that were fitted."""
    stored = json.loads(FITTED.read_text())["errors"]
    assert stored["held_out_halves"]["median"] >= errors(RUNS, fitted().coefficients).median
    assert all(one["median"] > stored["held_out_halves"]["median"] for one in stored["left_out"].values())


def test_published_ppo_times():
    factor, judged = judge_ppo(fitted().coefficients)
    assert judged.rows == len(read_ppo_runs()) == 11
    assert factor == pytest.approx(fitted().ppo_factor, rel=1e-3)
    assert judged.median < 0.2


MODEL = SpeedModel(fitted().coefficients, hardware_of("a100-80", 50.0), Practice())
NETWORK = NETWORKS["internlm-7b"]
LAYOUT = Layout(gpus=64, seq_len=4096, micro_batch=1, accumulation=4, zero=1, shard=64)


def seconds(**changes) -> float:
    return MODEL.step(NETWORK, replace(LAYOUT, **changes)).total


def test_parts_add_up():
    time = MODEL.step(NETWORK, LAYOUT)
    assert time.total == pytest.approx(sum(time.parts.values()))
    assert time.bound == "matrix products"


def test_directions():
    """More work takes longer; better links and fewer bytes take less."""
    assert seconds(recompute="full") > seconds(recompute="selective") > seconds()
    assert 2 * seconds() > seconds(accumulation=8) > 1.7 * seconds()  # the reduction comes once a step
    assert seconds(seq_len=8192) > 2 * seconds() * 0.98
    assert seconds(zero=3) > seconds()
    assert seconds(shard=8) < seconds(shard=64)
    assert seconds(zero=2) > seconds(zero=1)  # reduces in every pass
    fast = SpeedModel(fitted().coefficients, hardware_of("a100-80", 400.0), Practice())
    assert fast.step(NETWORK, LAYOUT).total < seconds()
    assert seconds(gpus=1024, shard=1024) > seconds()


def test_no_efficiency_exceeds_the_hardware():
    """Whatever the fit found, nothing runs faster than its data sheet."""
    for name in ("products_a100", "products_h100", "attention_a100", "attention_h100", "intra", "inter"):
        assert 0 < getattr(fitted().coefficients, name) < 1
    for run in RUNS:
        flops = run.network.flops(1, run.layout.seq_len)
        assert run.predicted(fitted().coefficients) * flops < run.hardware.peak_flops


def test_a_perfect_machine_needs_the_arithmetic_alone():
    """With every overhead gone and full efficiency, a step is its FLOPs over the peak."""
    nothing = dict.fromkeys(NAMES, 1e-15)
    ideal = Coefficients(**{**nothing, "products_a100": 1.0, "attention_a100": 1.0, "small_heads": 1.0, "intra": 1e9})
    speed = SpeedModel(ideal, replace(hardware_of("a100-80", 1e12), link_bandwidth=1e30), Practice())
    layout = Layout(gpus=1, seq_len=4096, zero=0)
    time = speed.step(NETWORK, layout).parts
    head = 6 * NETWORK.embedding * 4096
    products = 6 * NETWORK.layers * NETWORK.layer_weights * 4096
    assert time["matrix products"] == pytest.approx(products / 312e12, rel=1e-6)
    assert time["loss"] == pytest.approx(head / 312e12, rel=1e-6)
    # Attention's backward does 2.5 times its forward: 3.5 / 3 of the 6 that the formula of MFU counts.
    attention = NETWORK.flops(4096, 4096) - products - head
    assert time["attention"] == pytest.approx(attention / 312e12 * 3.5 / 3, rel=1e-3)
    assert not math.isinf(time["optimizer"])
