"""The reward model's loss through an engine: any split over micro-batches and ranks is one step; held-out verdicts."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from internlm2.config import BarrierConfig, OptimConfig, RewardConfig, TrainConfig
from internlm2.data.corpus import Corpus
from internlm2.data.encoding import encode_units
from internlm2.data.preference_pairs import PreferencePairs
from internlm2.data.preference_stream import PreferenceStream
from internlm2.data.reward_sequence import RewardSequences
from internlm2.data.shards import Shard, write_shard
from internlm2.engine.base import LossSum
from internlm2.engine.single import SingleEngine
from internlm2.rlhf.held_out_pairs import HeldOutPairs
from internlm2.rlhf.ranking import focal_ranking_losses, log_barrier, ranking_losses
from internlm2.rlhf.reward_loss import describe_result, reward_loss
from internlm2.rlhf.reward_metrics import pair_metrics
from internlm2.sources.documents import Answer, MemoryUnit
from internlm2.sources.preferences import comparison
from internlm2.text.chat import Message, render

SETTINGS = RewardConfig(
    loss="focal", focal_gamma=2.0, focal_detach=False, margin=0.0, barrier=BarrierConfig(0.02, 5.0, 1e-3),
    conditional=True, conditions={"helpful": "help", "brief": "be brief"}, validation_pairs=6,
)  # fmt: skip
OPTIM = OptimConfig(
    lr=1e-3, min_lr_ratio=1.0, schedule="constant", schedule_start=0.0, schedule_end=1.0, warmup_ratio=0.0, beta1=0.9,
    beta2=0.95, eps=1e-8, weight_decay=0.01, decay_embeddings=False, clip_grad_norm=1.0,
)  # fmt: skip
TRAIN = TrainConfig(seq_len=128, batch_tokens=1024, micro_batch=4, steps=1, tokens=None, epochs=None)


@pytest.fixture(scope="module")
def build(tokenizer, tmp_path_factory):
    """`build(held_out)`: a stream over 24 records of two domains, some of them with three answers."""

    def make(held_out=0.0):
        words = ["fox", "dog", "quick brown", "lazy", "jumps over", "code"]
        items = []
        for i in range(24):
            answers = [
                Answer((Message("assistant", f"{words[i % 6]} {n}" + " it" * (i % 4)),), -n) for n in range(2 + i % 2)
            ]
            prompt = [Message("user", f"the {words[i // 4]} {i}?")]
            items.append(comparison("f", i + 1, prompt, answers, ("helpful", "brief")[i % 2]))
        folder = tmp_path_factory.mktemp("shard")
        write_shard(folder, "s", encode_units([MemoryUnit(items, 1)], tokenizer, 1), tokenizer)
        corpus = Corpus({"s": Shard("s", folder)}, tokenizer.fingerprint, held_out, folder)
        told = {
            name: render([Message("system", text)], tokenizer).ids[1:] for name, text in SETTINGS.conditions.items()
        }
        pairs = PreferencePairs(corpus, ["s"], RewardSequences(tokenizer, told, TRAIN.seq_len))
        return PreferenceStream(pairs, {"s": 1.0}, TRAIN.batch_tokens, 0)

    return make


@pytest.fixture
def engine(reward_model):
    return lambda: SingleEngine(reward_model(), OPTIM, 100, "cpu", "fp32", "stop", None, 1)


def weights(engine):
    return torch.cat([view.view for view in engine.fragments(["weight"])])


def test_the_loss_is_the_mean_over_pairs_of_both_parts(build, engine, reward_model):
    (batch,) = build().micro_batches(0, TRAIN, 0, 1)
    with torch.no_grad():
        scores = reward_model().scores(batch.ids, batch.cu_seqlens)
    chosen, rejected = scores[batch.chosen], scores[batch.rejected]
    assert len(batch.pairs) > 6
    barrier = (log_barrier(chosen).mean() + log_barrier(rejected).mean()) / 2
    found = engine().evaluate([batch], reward_loss(SETTINGS))
    assert found.loss == pytest.approx(
        (focal_ranking_losses(chosen, rejected).mean() + 0.02 * barrier).item(), abs=1e-5
    )
    margins = 0.5 * batch.gaps
    plain = replace(SETTINGS, loss="plain", margin=0.5, barrier=BarrierConfig(0.0, 5.0, 1e-3))
    expected = ranking_losses(chosen, rejected, margin=margins).mean().item()
    assert engine().evaluate([batch], reward_loss(plain)).loss == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("micro_batch", [1, 4])
def test_any_split_over_ranks_and_micro_batches_is_the_same_step(build, engine, world, micro_batch):
    """What several ranks would each compute, one after another: unequal numbers of pairs, some batches without any."""
    stream, train = build(), replace(TRAIN, micro_batch=micro_batch)
    parts = [batch for rank in range(world) for batch in stream.micro_batches(0, train, rank, world)]
    if (world, micro_batch) == (4, 1):
        assert len({batch.loss_tokens for batch in parts}) > 1
    whole, split = engine(), engine()
    expected = whole.train_step(stream.micro_batches(0, TRAIN, 0, 1), reward_loss(SETTINGS))
    found = split.train_step([*parts, stream.collate(stream.pairs.training, [])], reward_loss(SETTINGS))
    assert found.loss_tokens == expected.loss_tokens
    assert found.loss == pytest.approx(expected.loss, abs=3e-6)
    assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-4)
    for key, value in describe_result(expected).items():
        assert describe_result(found)[key] == pytest.approx(value, abs=1e-5), key
    torch.testing.assert_close(weights(split), weights(whole), rtol=0, atol=2e-5)


def test_what_a_step_records(build, engine):
    (batch,) = build().micro_batches(0, TRAIN, 0, 1)
    record = describe_result(engine().train_step([batch], reward_loss(SETTINGS)))
    assert record["pairs"] == len(batch.pairs)
    assert 0 < record["accuracy"] < 1
    assert record["ranking_loss"] > 0 > record["barrier"]


def test_held_out_pairs_are_judged_under_their_own_and_the_other_condition(build, engine, reward_model):
    stream = build(0.5)
    judge = HeldOutPairs(stream, SETTINGS, 1)
    assert 0 < len(stream.pairs.training) < len(stream.pairs.training) + len(stream.pairs.held_out) == 48
    trained = engine()
    verdicts = judge.judge(trained, wrong_conditions=True)
    assert verdicts.domains.keys() == {"helpful", "brief"}
    for domain, other in (("helpful", "brief"), ("brief", "helpful")):
        pairs = judge.chosen[domain]
        assert len(pairs) == 6
        for told in (domain, other):
            batch = stream.collate(stream.pairs.held_out, pairs, told)
            with torch.no_grad():
                scores = reward_model().scores(batch.ids, batch.cu_seqlens)
            difference = scores[batch.chosen] - scores[batch.rejected]
            assert verdicts.swap[domain][told] == pytest.approx((difference > 0).float().mean().item())
            if told == domain:
                assert verdicts.domains[domain]["margin"] == pytest.approx(difference.mean().item(), abs=1e-5)
                assert verdicts.domains[domain]["accuracy"] == verdicts.swap[domain][domain]
    # Nothing is computed twice for the same weights, and everything anew for others.
    calls, evaluate = [], trained.evaluate
    trained.evaluate = lambda batches, loss: (
        calls.append(sum(len(b.cu_seqlens) - 1 for b in batches)) or evaluate(batches, loss)
    )
    assert judge.judge(trained).domains == verdicts.domains
    assert not calls
    trained.train_step(stream.micro_batches(0, TRAIN, 0, 1), reward_loss(SETTINGS))
    assert judge.judge(trained).domains["brief"]["margin"] != verdicts.domains["brief"]["margin"]
    judged = stream.pairs.held_out.take(np.concatenate(list(judge.chosen.values())))
    answers = set(judged.chosen) | set(judged.rejected)
    assert len(answers) <= sum(calls) < 2 * len(judged)
    together = np.concatenate([np.concatenate(scores) for scores in verdicts.scores.values()])
    assert verdicts.statistics()["std"] == pytest.approx(together.std())
    # Several ranks would each judge a part: their sums are the whole.
    table, pairs = stream.pairs.held_out, judge.chosen["helpful"]
    shares = [
        [pair for batch in stream.divide(table, [[p] for p in pairs], 1, rank, 3) for pair in batch.pairs]
        for rank in range(3)
    ]
    assert sorted(pair for share in shares for pair in share) == pairs.tolist()
    assert isinstance(reward_loss(SETTINGS)(reward_model(), stream.collate(table, [])), LossSum)


def test_metrics_of_known_scores():
    found = pair_metrics([2.0, 1.0, 0.0, 0.0], [0.0, 2.0, 0.0, -4.0], [10, 5, 7, 9], [5, 10, 7, 1])
    assert found["accuracy"] == pytest.approx((1 + 0 + 0.5 + 1) / 4)
    assert found["margin"] == pytest.approx((2 - 1 + 0 + 4) / 4)
    assert found["score_mean"] == pytest.approx(1 / 8)
    x, y = np.array([2, -1, 0, 4]), np.array([5, -5, 0, 8])
    both = np.corrcoef(np.r_[x, -x], np.r_[y, -y])[0, 1]
    assert found["length_correlation"] == pytest.approx(both)
    labels = np.corrcoef(np.r_[[1] * 4, [-1] * 4], np.r_[y, -y])[0, 1]
    assert found["label_length_correlation"] == pytest.approx(labels)


def test_calibration_of_known_verdicts():
    def error(*pairs):
        return pair_metrics(*map(list, zip(*pairs)), [1] * len(pairs), [2] * len(pairs))["calibration_error"]

    sure = np.log(9)  # the model says 90%
    assert error(*[(sure, 0.0)] * 9, (0.0, sure)) == pytest.approx(0.0, abs=1e-9)
    assert error(*[(sure, 0.0)] * 10) == pytest.approx(0.1)
    assert error(*[(0.0, sure)] * 10) == pytest.approx(0.9)
