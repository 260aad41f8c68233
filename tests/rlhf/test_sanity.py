"""Each thing that goes wrong in PPO is said in words, and a healthy run is left in peace."""

import pytest

from internlm2.rlhf.figures import figures
from internlm2.rlhf.sanity import findings
from internlm2.run.stage_summary import figure_fault

HEALTHY = {
    "phase": "ppo",
    "precision": "fp32",
    "old_logprobs": "recomputed",
    "answers": 64.0,
    "score": 1.0,
    "kl": 2.0,
    "ended": 0.98,
    "length": 40.0,
    "entropy": 1.2,
    "clipped": 0.05,
    "explained_variance": 0.6,
    "score_length_correlation": 0.1,
    "first_ratio_distance": 1e-7,
    "drift": {"kl": 1e-6},
    "value_loss": 0.3,
}


def run(count=25, **last):
    """A healthy run whose last ten iterations differ."""
    return [{"step": step, **HEALTHY} for step in range(1, count - 9)] + [
        {"step": step, **HEALTHY, **last} for step in range(count - 9, count + 1)
    ]


def test_a_healthy_run_has_no_findings():
    assert findings(run()) == {}
    assert findings([]) == {}


@pytest.mark.parametrize(
    ("changed", "name", "words"),
    [
        ({"first_ratio_distance": 0.01}, "ratio", "dropout"),
        ({"drift": {"kl": 0.05}}, "drift", "disagree"),
        ({"kl": -3.0}, "kl", "-3.00"),
        ({"kl": 80.0}, "kl", "far"),
        ({"ended": 0.5}, "ended", "50%"),
        ({"explained_variance": -0.4}, "critic", "below 0"),
        ({"score_length_correlation": 0.8}, "length", "length"),
        ({"length": 120.0}, "length", "grown from 40 to 120"),
        ({"entropy": 0.05}, "entropy", "explores"),
        ({"clipped": 0.6}, "gradient", "optim.lr"),
    ],
)
def test_what_is_wrong_is_said(changed, name, words):
    found = findings(run(**changed))
    assert list(found) == [name]
    assert words in found[name]


def test_rounding_is_forgiven_in_bf16_and_for_the_samplers_own_logprobs():
    assert "ratio" not in findings(run(first_ratio_distance=0.01, precision="bf16"))
    assert "ratio" not in findings(run(first_ratio_distance=0.01, old_logprobs="sampler"))


def test_warm_up_records_lack_the_actors_numbers():
    warm = {key: value for key, value in HEALTHY.items() if key not in ("clipped", "first_ratio_distance")}
    assert findings([{"step": 1, **warm}]) == {}


def test_figures_are_such_as_the_report_draws():
    records = [
        {"step": 0, "held_out": {"all": {"score": 0.5, "kl": 0.0, "gold": 1.0}, "math": {"score": 0.5, "kl": 0.0}}}
    ]
    records += run(12)
    records[-1]["held_out"] = {"all": {"score": 0.9, "kl": 4.0, "gold": 2.0}, "math": {"score": 0.9, "kl": 4.0}}
    drawn = figures(records)
    assert {"ppo_reward_kl", "ppo_score", "ppo_kl", "ppo_value_loss", "ppo_explained_variance"} <= drawn.keys()
    assert all(figure_fault(figure) is None for figure in drawn.values())
    lines = {line["label"]: line for line in drawn["ppo_reward_kl"]["series"]}
    assert lines["all"]["x"] == [0.0, 2.0]
    assert lines["all"]["y"] == [0.5, 0.9]
    assert lines["gold, all"]["y"] == [1.0, 2.0]
    assert "math" not in lines  # one domain is all of it
    assert figures([]) == {}
