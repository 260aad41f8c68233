"""`plan=true`: what it prints, what it proposes, and how fast."""

import io
import itertools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from internlm2.config import ConfigError
from internlm2.config.compose import CONF
from internlm2.plan.calibrate import calibrate
from internlm2.plan.coefficients import fitted
from internlm2.plan.layout import OURS
from internlm2.plan.memory import Buffers
from internlm2.plan.network import Network
from internlm2.plan.plan import plan_stage
from internlm2.plan.ppo_stage import plan_ppo
from internlm2.plan.report import print_plans
from internlm2.plan.search import Planner
from internlm2.plan.speed import SpeedModel
from internlm2.plan.work import make_layout
from internlm2.run.throughput import causal_pairs, step_flops
from tests.composing import composed, hydra_context  # noqa: F401 (a fixture)

REPOSITORY = Path(__file__).resolve().parents[2]


def printed(*overrides: str) -> str:
    out = io.StringIO()
    print_plans([composed(*overrides)], out)
    return out.getvalue()


@pytest.mark.parametrize("model", ["tiny", "1_8b", "7b", "20b"])
def test_counts_are_those_of_the_model_and_of_the_log(model):
    config = composed("stage=pretrain_4k", f"model={model}")
    network = Network.of(config.model)
    assert network.parameters == config.model.parameters()["total"]
    assert network.flops(4096, 4096) == pytest.approx(step_flops(config.model, 4096, causal_pairs([4096])), rel=1e-9)


def test_proposal_fits_and_can_be_typed():
    config = composed("stage=pretrain_4k", "model=20b", "cluster.gpus=256")
    plan = plan_stage(config)
    assert plan.configured is None
    assert "engine=single is one process" in plan.reason
    assert plan.best is not None
    assert plan.best.fits(plan.hardware)
    again = plan_stage(composed("stage=pretrain_4k", "model=20b", "cluster.gpus=256", *plan.best.overrides(8)))
    assert again.configured is not None
    assert again.configured.layout == plan.best.layout
    assert again.configured.time.total == pytest.approx(plan.best.time.total)


def test_no_setting_that_fits_is_faster():
    """The proposal against settings that are enumerated here, not by the search."""
    plan = plan_stage(composed("stage=pretrain_32k", "model=7b", "init_from=null", "cluster.gpus=64"))
    assert plan.best is not None
    speed = SpeedModel(fitted().coefficients, plan.hardware, replace(OURS, reduce_bytes=4))
    planner = Planner(plan.work, plan.hardware, speed, Buffers())
    fitting = 0
    for zero, shard, sequence, micro_batch, recompute in itertools.product(
        (1, 2, 3), (None, 8), (1, 2, 4, 8), (1, 2), ("none", "full")
    ):
        layout = make_layout(
            plan.work.rows,
            plan.work.seq_len,
            64,
            zero=zero,
            shard=shard,
            sequence=sequence,
            micro_batch=micro_batch,
            recompute=recompute,
        )
        other = planner.cost(layout)
        if other.fits(plan.hardware):
            fitting += 1
            assert other.time.total >= plan.best.time.total * (1 - 1e-9), layout
    assert fitting > 10


def test_days_and_rates_agree_with_each_other():
    plan = plan_stage(composed("stage=pretrain_4k", "model=7b", "cluster.gpus=64", "engine=zero1"))
    assert plan.configured is not None
    days = plan.days(plan.configured)
    assert days is not None
    steps = 1_800_000_000_000 // 4_194_304
    tokens = steps * 4_194_304
    rate = plan.tokens_per_second(plan.configured)
    assert days == pytest.approx(tokens / (rate * 64) / 86_400, rel=1e-6)
    assert 0.2 < plan.mfu(plan.configured) < 0.8


def test_what_does_not_fit_says_so_and_names_a_size_that_does():
    text = printed("stage=pretrain_4k", "model=20b", "cluster=a100_40", "cluster.gpus=1")
    assert "no setting fits 1 GPUs; " in text
    assert "would do" in text
    assert "does not fit" in printed("stage=pretrain_4k", "model=20b", "engine=zero1", "cluster.gpus=8")


@pytest.mark.parametrize("cluster", sorted(file.stem for file in (CONF / "cluster").glob("*.yaml")))
def test_every_cluster_composes_and_prints_the_error_band(cluster):
    text = printed("stage=pretrain_4k", "model=1_8b", f"cluster={cluster}", "cluster.gpus=16")
    assert "how sure: on published runs held out" in text
    assert "tokens/s/GPU" in text


def test_time_factor_scales_time_and_nothing_else():
    plain, slow = (
        plan_stage(
            composed("stage=pretrain_4k", "model=7b", "engine=zero1", "cluster.gpus=16", f"cluster.time_factor={f}")
        )
        for f in (1.0, 1.25)
    )
    assert plain.configured is not None
    assert slow.configured is not None
    assert slow.configured.time.total == pytest.approx(1.25 * plain.configured.time.total)
    assert slow.configured.memory == plain.configured.memory


def test_ppo_phases_and_four_models():
    plan = plan_ppo(composed("stage=ppo", "model=7b", "cluster.gpus=32"))
    assert plan.best is not None
    assert set(plan.best.phases) == {"generation", "scoring", "actor training", "critic training"}
    assert {"actor with optimizer", "critic with optimizer", "reference (bf16)", "reward model (bf16)"} <= set(
        plan.best.training.parts
    )
    assert plan.best.peak.total <= plan.hardware.memory_bytes
    quantized = plan_ppo(
        composed(
            "stage=ppo", "model=7b", "cluster.gpus=32", "generation.quantize=w4", "ppo.correction.weights=truncated"
        )
    )
    assert quantized.best is not None
    assert quantized.best.phases["generation"] < plan.best.phases["generation"]
    alone = plan_ppo(
        composed(
            "stage=ppo",
            "model=7b",
            "cluster.gpus=32",
            "ppo.estimator=grpo",
            "ppo.samples_per_prompt=4",
            "ppo.critic_warmup=0",
        )
    )
    assert alone.best is not None
    assert "critic training" not in alone.best.phases
    assert "critic with optimizer" not in alone.best.training.parts


def test_calibrate_brings_the_plan_to_the_measured_run(tmp_path):
    config = composed("stage=pretrain_4k", "model=7b", "engine=zero1", "cluster.gpus=16")
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
    plan = plan_stage(config)
    assert plan.configured is not None
    measured = 1.3 * plan.configured.time.total
    slow_start = [10 * measured] * 3
    records = [{"step": i, "seconds": s} for i, s in enumerate([*slow_start, *[measured] * 6], 1)]
    (tmp_path / "timing.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    found = calibrate(tmp_path)
    assert found.factor == pytest.approx(1.3)
    (tmp_path / "checkpoints" / "step_00000009").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step_00000009" / "index.json").write_text(json.dumps({"world_size": 32}))
    assert calibrate(tmp_path).gpus == 32


def test_calibrate_says_what_is_missing(tmp_path):
    with pytest.raises(ConfigError, match="give a run directory"):
        calibrate(tmp_path)
    config = composed("stage=pretrain_4k")
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
    with pytest.raises(ConfigError, match="has not made a step"):
        calibrate(tmp_path)
    (tmp_path / "timing.jsonl").write_text('{"step": 1, "seconds": 1.0}\n')
    with pytest.raises(ConfigError, match="needs 5"):
        calibrate(tmp_path)


def test_the_command_imports_no_torch():
    """Under two seconds is what that buys; the clock itself is not tested."""
    code = (
        "import sys, runpy; sys.argv = ['train.py', 'stage=ppo', 'model=20b', 'plan=true', 'cluster.gpus=256']\n"
        "runpy.run_path('train.py', run_name='__main__')\n"
        "print([name for name in ('torch', 'numpy', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    assert "generated tokens/s/GPU" in done.stdout


def test_cluster_files_state_one_direction_and_their_source():
    for file in (CONF / "cluster").glob("*.yaml"):
        text = file.read_text()
        assert "one direction" in text
        assert yaml.safe_load(text)["time_factor"] == 1.0
