"""The single-process engine against plain PyTorch, at any split of a batch, in fp32 and bf16."""

import gc
import math
import weakref

import pytest
import torch
from tiny_training import OPTIM, Model, Rows, cross_entropy, make_engine, make_rows, split
from torch import nn

from internlm2.engine.base import LossSum
from internlm2.engine.guard import TrainingStopped
from internlm2.engine.schedule import learning_rate


def gradients(engine, batches) -> dict[str, torch.Tensor]:
    """The full gradient of one step, seen just before the update."""
    seen: dict[str, torch.Tensor] = {}
    update = engine._update

    def spy(lr, norm):
        seen.update({name: master.grad.clone() for name, master in engine._masters.items()})
        update(lr, norm)

    engine._update = spy
    engine.train_step(batches, cross_entropy)
    return seen


def test_thirty_steps_equal_plain_pytorch():
    """Oracle: torch's own AdamW, clip_grad_norm_ and a mean loss, written out."""
    model = Model()
    decay = [model.inner.weight, model.output.weight]
    rest = [model.tok_embeddings.weight, model.norm.weight]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), eps=1e-8)
    engine = make_engine()
    for step in range(30):
        rows = make_rows(8, seed=step)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(rows.ids).flatten(0, 1), rows.labels.flatten(), ignore_index=-100)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, 40, OPTIM)
        optimizer.step()
        result = engine.train_step([rows], cross_entropy)
        assert result.loss == pytest.approx(loss.item(), rel=1e-5)
        assert result.grad_norm == pytest.approx(norm.item(), rel=1e-4)
        assert result.lr == learning_rate(step, 40, OPTIM)
        assert result.applied
        assert result.loss_tokens == rows.loss_tokens
    assert result.loss < 2.5 < math.log(29)  # it learns the rule, from about log(29)
    for (name, ours), theirs in zip(engine.model.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_gradient_does_not_depend_on_the_split(size):
    rows = make_rows(8)
    whole, parts = gradients(make_engine(), [rows]), gradients(make_engine(), split(rows, size))
    for name in whole:
        assert (whole[name] - parts[name]).norm() <= 1e-6 * whole[name].norm(), name


def test_loss_and_parts_are_sums_over_the_whole_batch():
    rows = make_rows(8)
    whole = make_engine().train_step([rows], cross_entropy)
    parts = make_engine().train_step(split(rows, 1), cross_entropy)
    assert parts.loss == pytest.approx(whole.loss, rel=1e-6)
    assert parts.parts == whole.parts
    assert whole.loss_tokens == parts.loss_tokens == rows.loss_tokens


def test_same_run_twice_is_bit_identical():
    def run(dtype):
        engine = make_engine(dtype=dtype)
        losses = [engine.train_step(split(make_rows(4, seed=s), 2), cross_entropy).loss for s in range(5)]
        return losses, [p.clone() for p in engine.model.parameters()]

    for dtype in ("fp32", "bf16"):
        (losses, weights), (again, weights_again) = run(dtype), run(dtype)
        assert losses == again
        assert all(torch.equal(a, b) for a, b in zip(weights, weights_again, strict=True))


def test_fp32_keeps_no_copy_of_weights_or_gradients():
    engine = make_engine()
    assert all(engine._masters[name] is parameter for name, parameter in engine.model.named_parameters())
    engine.train_step([make_rows(2)], cross_entropy)
    assert all(parameter.grad is None for parameter in engine.model.parameters())


def test_bf16_has_fp32_masters_and_holds_no_gradient_between_steps():
    engine = make_engine(Model(seed=3), dtype="bf16")
    exact = Model(seed=3)
    assert all(p.dtype == torch.bfloat16 for p in engine.model.parameters())
    assert engine.model.table.dtype == torch.float32
    for name, weight in engine.full_weights():
        assert torch.equal(weight, exact.get_parameter(name)), "the master is the value before the cast"
    engine.train_step([make_rows(2)], cross_entropy)
    for name, parameter in engine.model.named_parameters():
        assert parameter.grad is None
        assert engine._masters[name].grad is None
        assert torch.equal(parameter, engine._masters[name].bfloat16())


def test_bf16_accumulates_in_fp32():
    """256 gradients of one and 2**-8 each: in bf16 the sum would stall at one; the masters get the exact mean."""

    class Scalar(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, 4))

    class Value:
        loss_tokens = 1

        def __init__(self, value: float) -> None:
            self.value = value

        def to(self, device):
            return self

    def loss(model, batch):
        return LossSum((model.weight.float() * batch.value).sum() * 257, 1)

    engine = make_engine(Scalar(), dtype="bf16", clip_grad_norm=0.0)
    result = engine.train_step([Value(1.0)] + [Value(2.0**-8)] * 256, loss)
    assert result.grad_norm == pytest.approx(2.0 * 4, rel=1e-3)


def test_bf16_frees_each_gradient_during_backward():
    engine = make_engine(dtype="bf16")
    live: list[weakref.ref] = []
    for parameter in engine.model.parameters():
        parameter.register_hook(lambda gradient: live.append(weakref.ref(gradient)))
    alive_at_update = []
    update = engine._update

    def spy(lr, norm):
        gc.collect()
        alive_at_update.append([p.grad for p in engine.model.parameters() if p.grad is not None])
        update(lr, norm)

    engine._update = spy
    engine.train_step(split(make_rows(4), 2), cross_entropy)
    assert len(live) == 8
    assert alive_at_update == [[]]
    assert all(reference() is None for reference in live)


def test_bf16_follows_fp32():
    losses = {}
    for dtype in ("fp32", "bf16"):
        engine = make_engine(dtype=dtype)
        losses[dtype] = [engine.train_step([make_rows(8, seed=s)], cross_entropy).loss for s in range(30)]
    assert losses["bf16"] == pytest.approx(losses["fp32"], abs=0.05)


def test_norms_and_embeddings_do_not_decay_unless_asked():
    def after_a_step_without_gradient(**changes):
        engine = make_engine(warmup_ratio=0.0, **changes)
        zero = lambda model, batch: LossSum(sum((p * 0).sum() for p in model.parameters()), 1)  # noqa: E731
        engine.train_step([Rows(torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.int64))], zero)
        start = Model()
        return {name for name, p in engine.model.named_parameters() if not torch.equal(p, start.get_parameter(name))}

    assert after_a_step_without_gradient() == {"inner.weight", "output.weight"}
    assert after_a_step_without_gradient(decay_embeddings=True) == {
        "inner.weight",
        "output.weight",
        "tok_embeddings.weight",
    }


def test_tied_head_is_one_parameter_and_counts_as_an_embedding():
    model = Model()
    model.output.weight = model.tok_embeddings.weight
    engine = make_engine(model, dtype="bf16")
    assert "output.weight" not in engine.shapes()
    engine.train_step([make_rows(2)], cross_entropy)
    assert model.output.weight is model.tok_embeddings.weight
    assert [len(group["params"]) for group in engine._optimizer.param_groups] == [1, 2]


def test_frozen_parameters_stay():
    model = Model()
    model.inner.requires_grad_(False)
    before = model.inner.weight.clone()
    engine = make_engine(model, dtype="bf16")
    engine.train_step([make_rows(2)], cross_entropy)
    assert torch.equal(model.inner.weight, before.bfloat16())
    assert "inner.weight" not in engine.shapes()


def test_clipping_scales_to_the_limit():
    # SGD-like view: with beta1 = 0 the first moment is the clipped gradient itself.
    engine = make_engine(beta1=0.0, clip_grad_norm=1e-3)
    norm = engine.train_step([make_rows(8)], cross_entropy).grad_norm
    moments = torch.cat([f.view for f in engine.fragments(["exp_avg"])])
    assert norm > 0.1
    assert moments.norm().item() == pytest.approx(1e-3, rel=1e-4)


def poisoned(model, batch):
    loss = cross_entropy(model, batch)
    return LossSum(loss.sum * math.nan, loss.tokens)


def scaled(factor):
    def loss_fn(model, batch):
        loss = cross_entropy(model, batch)
        return LossSum(loss.sum * factor, loss.tokens)

    return loss_fn


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("bad", [poisoned, scaled(math.inf)])
def test_skip_leaves_weights_and_moments_and_counts_the_step(dtype, bad):
    engine = make_engine(dtype=dtype)
    engine.train_step([make_rows(4)], cross_entropy)
    before = [f.view.clone() for f in engine.fragments()]
    result = engine.train_step([make_rows(4)], bad)
    assert not result.applied
    assert result.verdict == "skipped"
    assert "the loss is" in result.reason
    assert all(torch.equal(a, f.view) for a, f in zip(before, engine.fragments(), strict=True))
    assert engine.state_dict() | {"guard": None} == {"step": 2, "adam_step": 1, "guard": None}
    assert engine.train_step([make_rows(4)], cross_entropy).applied


def test_non_finite_gradient_of_a_finite_loss_is_caught():
    def root(model, batch):  # d sqrt(x) / dx at 0 is infinite
        loss = cross_entropy(model, batch)
        return LossSum(loss.sum + torch.sqrt((model.norm.weight - model.norm.weight.detach()).abs().sum()), loss.tokens)

    result = make_engine().train_step([make_rows(4)], root)
    assert math.isfinite(result.loss)
    assert not result.applied
    assert "gradient norm" in result.reason


def test_stop_ends_at_once_and_changes_nothing():
    engine = make_engine(on_nonfinite="stop")
    before = [f.view.clone() for f in engine.fragments()]
    with pytest.raises(TrainingStopped, match=r"Step 1 was not applied: the loss is nan.*on_nonfinite=stop"):
        engine.train_step([make_rows(4)], poisoned)
    assert all(torch.equal(a, f.view) for a, f in zip(before, engine.fragments(), strict=True))


def test_too_many_bad_steps_end_the_run():
    engine = make_engine(max_bad_steps=3)
    for _ in range(2):
        assert not engine.train_step([make_rows(4)], poisoned).applied
    engine.train_step([make_rows(4)], cross_entropy)  # recovery: the count starts again
    for _ in range(2):
        engine.train_step([make_rows(4)], poisoned)
    with pytest.raises(TrainingStopped, match="bad step number 3"):
        engine.train_step([make_rows(4)], poisoned)


def test_spike_is_judged_against_the_median_of_recent_losses():
    engine = make_engine(spike_factor=1.5)
    assert engine.train_step([make_rows(4)], scaled(1.6)).applied, "no history, no verdict"
    for _ in range(20):
        assert engine.train_step([make_rows(4)], cross_entropy).applied
    history = list(engine.guard.losses)
    result = engine.train_step([make_rows(4)], scaled(4.0))
    assert result.verdict == "skipped"
    assert "spike_factor" in result.reason
    assert engine.guard.losses == history, "a spike does not shift the median"


def test_wrong_token_counts_are_refused():
    def miscounts(model, batch):
        loss = cross_entropy(model, batch)
        return LossSum(loss.sum, loss.tokens + 1)

    rows = make_rows(4)
    with pytest.raises(ValueError, match=f"counted {rows.loss_tokens + 1} tokens.*announced {rows.loss_tokens}"):
        make_engine().train_step([rows], miscounts)
    with pytest.raises(ValueError, match="none of the 1 micro-batches has a token with a loss"):
        make_engine().train_step([Rows(rows.ids, torch.full_like(rows.labels, -100))], cross_entropy)


def test_evaluate_sums_without_touching_the_model():
    engine = make_engine()
    rows = make_rows(8)
    before = [p.clone() for p in engine.model.parameters()]
    engine.model.train()
    result = engine.evaluate(split(rows, 3), cross_entropy)
    expected = nn.functional.cross_entropy(
        engine.model(rows.ids).flatten(0, 1), rows.labels.flatten(), ignore_index=-100
    )
    assert result.loss == pytest.approx(expected.item(), rel=1e-6)
    assert result.tokens == rows.loss_tokens
    assert engine.model.training
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, engine.model.parameters(), strict=True))
    assert math.isnan(engine.evaluate([], cross_entropy).loss)
