"""`dry_run=true`: real engines on shapes, against real tensors and against the plan."""

import contextlib
import io
import tracemalloc

import pytest
import torch

from internlm2.config import ConfigError
from internlm2.dry_run.hollow import hollow
from internlm2.dry_run.run import batch, dry_run, rehearse_ranks
from internlm2.engine.build import build_engine
from internlm2.model.transformer import CausalLM
from internlm2.plan.plan import plan_stage
from tests.composing import composed, hydra_context  # noqa: F401 (a fixture)


def test_storages_are_counted_from_birth_to_death():
    with hollow() as mode:
        a = torch.zeros(1000, 1000)
        assert mode.live == 4_000_000
        b = a.view(-1)[:10]  # no memory of its own
        assert mode.live == 4_000_000
        c = a.to(torch.bfloat16)
        assert mode.live == 6_000_000
        del a
        assert mode.live == 6_000_000  # b still holds it
        del b, c
        assert mode.live == 0
        assert mode.peak == 6_000_000


def test_a_step_on_shapes_takes_what_the_real_step_takes():
    """The same engine with contents: the tensors that are left after a step are as large, to the byte."""
    config = composed(
        "engine=single", "engine.dtype=bf16", "cluster.gpus=1", "train.seq_len=128", "train.batch_tokens=128"
    )
    one = rehearse_ranks(config, [0])[0]
    model = CausalLM(config.model, attention="reference")
    engine = build_engine(model, config.engine, config.optim, 10)
    held = {p.data.untyped_storage().data_ptr(): p.data.untyped_storage().nbytes() for p in model.parameters()}
    for fragment in engine.fragments():
        storage = fragment.view.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
    buffers = sum(buffer.untyped_storage().nbytes() for buffer in model.buffers())
    assert one.resting == pytest.approx(sum(held.values()) + buffers, rel=1e-3)
    assert one.peak > one.resting


@pytest.mark.parametrize("engine", [pytest.param("zero1", marks=pytest.mark.slow), "zero3"])
def test_one_piece_for_all_ranks_takes_the_memory_of_every_rank_s_piece(engine, monkeypatch):
    """DeepSpeed's own loops over the ranks, at a number of them that it can walk through, against the short cut."""
    size = ["model.layers=1", "train.seq_len=64", "train.micro_batch=1", "train.batch_tokens=384"]
    config = composed(f"engine={engine}", "cluster.gpus=6", *size)
    short = rehearse_ranks(config, [0, 5])
    monkeypatch.setattr("internlm2.dry_run.hollow.one_piece_for_all", contextlib.nullcontext)
    for ours, theirs in zip(short, rehearse_ranks(config, [0, 5]), strict=True):
        assert (ours.resting, ours.peak) == (theirs.resting, theirs.peak)
        assert ours.pieces == theirs.pieces


def test_flags_read_as_not_set_and_numbers_as_one():
    with hollow():
        assert not bool((torch.zeros(3) > 1).any())
        assert torch.zeros(3).sum().item() == 1.0


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_planned_memory_of_one_gpu(recompute):
    """plan=true against what the tensors of a real step take: the width of 7b, few layers, long rows."""
    config = composed(
        "model=7b",
        "engine=single",
        "cluster.gpus=1",
        "engine.dtype=bf16",
        "model.layers=6",
        "model.vocab_size=4096",
        "data.tokenizer.vocab_size=4096",
        "train.seq_len=4096",
        "train.micro_batch=4",
        "train.batch_tokens=16384",
        f"engine.recompute={recompute}",
    )
    planned = plan_stage(config).configured
    assert planned is not None
    one = rehearse_ranks(config, [0])[0]
    assert planned.memory.allocated == pytest.approx(one.peak, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "low", "high"), [("zero1", 0.96, 1.04), ("zero3", 1.0, 1.3)])
def test_planned_memory_of_one_gpu_of_many(engine, low, high):
    """ZeRO 3 is planned with engine.zero.live_parameters gathered at once; four layers never hold so many."""
    config = composed(
        "model=7b",
        f"engine={engine}",
        "engine.dtype=bf16",
        "engine.recompute=full",
        "cluster.gpus=64",
        "model.layers=4",
        "model.vocab_size=32768",
        "data.tokenizer.vocab_size=32768",
        "train.seq_len=4096",
        "train.micro_batch=1",
        "train.batch_tokens=524288",
    )
    planned = plan_stage(config).configured
    assert planned is not None
    one = rehearse_ranks(config, [0])[0]
    assert low * one.peak <= planned.memory.allocated <= high * one.peak


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero1", "zero2", "zero3"])
def test_a_thousand_ranks(engine):
    config = composed(f"engine={engine}", "cluster.gpus=1024", "train.batch_tokens=4194304", "engine.recompute=full")
    out = io.StringIO()
    dry_run([config], out)
    told = out.getvalue()
    assert "1,024 ranks, on shapes alone" in told
    assert "every element once" in told
    assert "rank 1023" in told


def test_ppo_and_uneven_ranks_are_refused():
    with pytest.raises(ConfigError, match="use plan=true"):
        dry_run([composed("stage=ppo")])
    with pytest.raises(ConfigError, match="engine=single is one process"):
        dry_run([composed("engine=single", "cluster.gpus=8")])


def test_a_batch_on_shapes_takes_no_memory():
    config = composed("train.micro_batch=8", "train.batch_tokens=32768")
    tracemalloc.start()
    with hollow() as mode:
        made = batch(config)
        assert mode.live == 2 * 8 * 4096 * 8
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert made.cu_seqlens.tolist() == [4096 * row for row in range(9)]
    assert peak < 10_000_000
