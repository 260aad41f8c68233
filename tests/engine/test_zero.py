"""ZeRO on real ranks is the single engine: same losses, norms, weights, verdicts, whatever is sharded how."""

import math

import pytest
import torch
from rank_training import SPLITTING, engine_config, run, start, step_rows, train
from tiny_training import OPTIM, Model, cross_entropy, make_rows

from internlm2.config import ConfigError, FrozenConfig
from internlm2.config.zero import check_engine
from internlm2.engine.base import LossSum
from internlm2.engine.build import build_engine
from internlm2.engine.guard import TrainingStopped
from tests.ranks import run_ranks

STAGES = ("zero1", "zero2", "zero3")


@pytest.fixture(scope="module")
def single():
    """The run of one process that all others are held against."""
    return run("single", 30)


def assert_same(ranks: list[dict], single: dict, tolerance: float = SPLITTING) -> None:
    assert all(other["records"] == ranks[0]["records"] for other in ranks)
    for ours, theirs in zip(ranks[0]["records"], single["records"], strict=True):
        assert ours[0] == pytest.approx(theirs[0], abs=tolerance)
        assert ours[1] == pytest.approx(theirs[1], rel=max(1e-4, tolerance))
        assert ours[2:4] == theirs[2:4]
    assert ranks[0]["evaluated"][0] == pytest.approx(single["evaluated"][0], abs=10 * tolerance)
    assert ranks[0]["evaluated"][1] == single["evaluated"][1]
    assert ranks[0]["weights"].keys() == single["weights"].keys()


@pytest.mark.parametrize("name", STAGES)
def test_two_ranks(name, single):
    ranks = run_ranks(run, 2, name, 30)
    assert_same(ranks, single)
    for key, weight in single["weights"].items():
        assert torch.equal(ranks[0]["weights"][key], ranks[1]["weights"][key])
        assert torch.allclose(ranks[0]["weights"][key], weight, atol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("world_size", [1, 3, 4])
def test_other_numbers_of_ranks(name, world_size, single):
    assert_same(run_ranks(run, world_size, name, 30), single)


def with_changes(name, steps, changes):
    return run(name, steps, **changes)


VARIANTS = [
    ("zero1", {"shard_group": 2}),
    ("zero2", {"shard_group": 2}),
    ("zero3", {"shard_group": 2}),
    ("zero2", {"offload": "optimizer"}),
    ("zero2", {"offload": "optimizer", "shard_group": 2}),
    ("zero3", {"offload": "parameters"}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "changes"), VARIANTS, ids=lambda value: str(value))
def test_where_the_state_lies_changes_nothing(name, changes, single):
    assert_same(run_ranks(with_changes, 4, name, 30, changes), single)


@pytest.mark.parametrize("name", ["zero1", pytest.param("zero2", marks=pytest.mark.slow), "zero3"])
def test_bf16_on_one_rank_is_bit_for_bit_the_single_engine(name):
    """Masters come from the fp32 weights, and gradients of several micro-batches are summed in fp32."""
    expected = run("single", 6, dtype="bf16")
    (found,) = run_ranks(with_changes, 1, name, 6, {"dtype": "bf16"})
    for ours, theirs in zip(found["records"], expected["records"], strict=True):
        assert ours[0] == theirs[0]
        assert ours[1] == pytest.approx(theirs[1], rel=1e-6)
    assert all(torch.allclose(found["weights"][key], weight, atol=1e-6) for key, weight in expected["weights"].items())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "changes"), [*((name, {}) for name in STAGES), ("zero1", {"shard_group": 2})])
def test_bf16_on_four_ranks(name, changes):
    expected = run("single", 12, dtype="bf16")
    ranks = run_ranks(with_changes, 4, name, 12, {"dtype": "bf16", **changes})
    assert_same(ranks, expected, tolerance=1e-2)


def test_ranks_without_a_row_walk_one_again(single):
    """Five rows over three ranks in micro-batches of one: two, two and one; evaluation: three rows, then one."""
    expected = run("single", 4, rows=5)
    ranks = run_ranks(run, 3, "zero3", 4, 5)
    for ours, theirs in zip(ranks[2]["records"], expected["records"], strict=True):
        assert ours == pytest.approx(theirs, abs=SPLITTING)
    assert ranks[2]["evaluated"] == pytest.approx(expected["evaluated"], abs=SPLITTING)


def spoilt(bad_step, policy, verdicts):
    engine = start("zero2", on_nonfinite=policy)

    def loss_fn(model, batch):
        loss = cross_entropy(model, batch)
        poison = float("nan") if engine.step == bad_step and engine.rank == 1 else 1.0
        return LossSum(loss.sum * poison, loss.tokens, loss.parts)

    before: dict[str, torch.Tensor] = {}
    for step in range(4):
        weights = {name: weight.clone() for name, weight in engine.full_weights()}
        try:
            result = engine.train_step(step_rows(engine, make_rows(8, seed=step)), loss_fn)
            verdicts.append([result.verdict, result.reason])
        except TrainingStopped as error:
            return [[*verdict] for verdict in verdicts] + [["stopped", str(error)]]
        if step == bad_step:
            assert math.isnan(result.loss)
            before = {name: weight.clone() for name, weight in engine.full_weights()}
            assert all(torch.equal(weights[name], weight) for name, weight in before.items())
    assert any(not torch.equal(before[name], weight) for name, weight in engine.full_weights())
    return verdicts


@pytest.mark.parametrize(("policy", "expected"), [("skip", "skipped"), ("stop", "stopped")])
def test_a_loss_that_is_not_finite_on_one_rank_is_judged_alike_by_all(policy, expected):
    first, second = run_ranks(spoilt, 2, 2, policy, [])
    assert first == second
    assert [verdict for verdict, _ in first][:3] == ["applied", "applied", expected]
    assert "the loss is nan" in first[2][1]


def bad_gradient(name, dtype):
    """A finite loss with a gradient that is not: the square root of zero."""
    engine = start(name, dtype=dtype)

    def loss_fn(model, batch):
        loss = cross_entropy(model, batch)
        extra = torch.sqrt((model.output.weight * 0).sum()) if engine.step == 1 else 0.0
        return LossSum(loss.sum + extra, loss.tokens, loss.parts)

    results = [engine.train_step(step_rows(engine, make_rows(8, seed=step)), loss_fn) for step in range(3)]
    assert math.isfinite(results[1].loss)
    assert all(bool(weight.isfinite().all()) for _, weight in engine.full_weights())
    return [[result.verdict, result.reason] for result in results]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("zero1", "fp32"), ("zero3", "fp32"), *(pytest.param(n, "bf16", marks=pytest.mark.slow) for n in STAGES)],
)
def test_a_gradient_that_is_not_finite_is_skipped(name, dtype):
    for verdicts in run_ranks(bad_gradient, 2, name, dtype):
        assert [verdict for verdict, _ in verdicts] == ["applied", "skipped", "applied"]
        assert "gradient norm is inf" in verdicts[1][1]


def leftover_weights(name):
    """`whole` gives a plain module between two steps, also to one rank alone; training then goes on unchanged."""
    engine = start(name)
    records = train(engine, 2)
    with engine.whole() as model:
        logits = model(torch.arange(7)[None]) if engine.rank == 0 else torch.zeros(1)
    return {"logits": logits.detach(), "records": records + train(engine, 2)}


@pytest.mark.parametrize("name", ["zero1", "zero3"])
def test_the_whole_model_on_one_rank(name, single):
    engine = start("single")
    train(engine, 2)
    ranks = run_ranks(leftover_weights, 2, name)
    assert torch.allclose(ranks[0]["logits"], engine.model(torch.arange(7)[None]), atol=1e-5)
    for ours, theirs in zip(ranks[1]["records"], single["records"][:4], strict=True):
        assert ours == pytest.approx(theirs, abs=SPLITTING)


def two_engines():
    """An actor and a critic, as PPO has them, in one process."""
    engines = [start("zero3"), start("zero1", seed=1)]
    return [train(engine, 3) for engine in engines] + [train(engine, 3) for engine in engines]


def test_two_engines_in_one_process(single):
    other = build_engine(Model(1), engine_config("single"), OPTIM, 40)
    expected = [single["records"][:3], train(other, 3), single["records"][3:6], train(other, 3)]
    for ranks in run_ranks(two_engines, 2):
        for ours, theirs in zip(ranks, expected, strict=True):
            assert [record[0] for record in ours] == pytest.approx([record[0] for record in theirs], abs=SPLITTING)


def test_a_model_without_trained_parameters_is_refused():
    with pytest.raises(ValueError, match="no trainable parameter"):
        start_frozen("zero1")


def start_frozen(name):
    build_engine(Model().requires_grad_(False), engine_config(name), OPTIM, 40)


class Shape:
    kv_heads = 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"name": "zero1", "sequence_parallel": 4},
            "sequence_parallel=4 must divide model.kv_heads=6: use 1",
        ),
        ({"name": "single", "sequence_parallel": 2}, "engine=single is one: use engine=zero1"),
        ({"name": "zero2", "offload": "parameters"}, "needs engine=zero3"),
        ({"name": "single", "offload": "optimizer"}, "belongs to engine=zero1"),
    ],
)
def test_keys_that_do_not_fit(changes, message):
    name = changes.pop("name")
    with pytest.raises(ConfigError, match=message):
        check_engine(engine_config(name, **changes), Shape(), FrozenConfig("none", False))
