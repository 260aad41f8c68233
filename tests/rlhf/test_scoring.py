"""Scores of conversations: batch mates, packing, padding and pad ids change nothing; ours and transformers' agree."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from internlm2.config import ConfigError
from internlm2.model.export import REWARD_SETTINGS, export_weights
from internlm2.model.scalar import ScalarModel
from internlm2.model.weights import model_weights, open_weights
from internlm2.rlhf.conditions import Conditions
from internlm2.rlhf.scoring import RewardScorer, read_reward_settings
from internlm2.text.chat import Message, render

CONDITIONS = Conditions({"helpful": "be helpful", "brief": "be brief", "default": ""})
TALKS = [
    [Message("user", "fox?"), Message("assistant", "the quick brown fox")],
    [Message("user", "dog?"), Message("assistant", "lazy")],
    [Message("system", "You write."), Message("user", "code?"), Message("assistant", "jumps over it " * 9)],
    [Message("user", "a"), Message("assistant", "b"), Message("user", "c"), Message("assistant", "d")],
]
DOMAINS = ["helpful", "brief", "default", "helpful"]


@pytest.fixture
def scorer(reward_model, tokenizer):
    def make(**options):
        return RewardScorer(reward_model(), tokenizer, CONDITIONS, seq_len=256, **options)

    return make


def test_batch_mates_and_their_order_change_nothing(scorer):
    together = scorer().score(TALKS, DOMAINS)
    alone = [scorer().score([talk], [domain])[0] for talk, domain in zip(TALKS, DOMAINS)]
    assert np.std(alone) > 0.1
    assert together == pytest.approx(alone, abs=1e-5)
    assert scorer(batch_tokens=40).score(TALKS, DOMAINS) == pytest.approx(alone, abs=1e-5)
    assert scorer().score(TALKS[::-1], DOMAINS[::-1]) == pytest.approx(alone[::-1], abs=1e-5)
    assert scorer().score([], []) == []


def test_a_score_is_read_at_the_reward_token_behind_the_condition(scorer, tokenizer):
    judge = scorer()
    ids = [*render(CONDITIONS.apply(TALKS[0], "helpful"), tokenizer).ids, tokenizer.special_id("<|reward|>")]
    values = judge.model(torch.tensor(ids), torch.tensor([0, len(ids)], dtype=torch.int32))
    assert judge.score(TALKS[:1], ["helpful"])[0] == pytest.approx(values[-1].item(), abs=1e-6)
    assert judge.score(TALKS[:1], ["brief"])[0] != pytest.approx(values[-1].item(), abs=1e-3)


def test_a_long_answer_keeps_its_end_and_the_model_its_mode(scorer):
    judge = scorer()
    judge.model.train()
    (score,) = judge.score([[Message("user", "q"), Message("assistant", "fox " * 500)]], ["default"])
    assert np.isfinite(score)
    assert judge.model.training


def test_what_cannot_be_scored_is_named(scorer):
    with pytest.raises(ConfigError, match="domain 'poetry'"):
        scorer().score(TALKS[:1], ["poetry"])
    with pytest.raises(ValueError, match="must end with a turn of the assistant"):
        scorer().score([TALKS[0][:1]], ["helpful"])
    with pytest.raises(ValueError, match="4 conversations came with 1 domains"):
        scorer().score(TALKS, ["helpful"])


@pytest.fixture
def exported(reward_model, tokenizer, tmp_path):
    """An export with conditions and statistics."""
    tokenizer.save(tmp_path / "tokenizer")
    settings = {"conditions": dict(CONDITIONS.texts), "score": {"mean": 0.5, "std": 2.0}}
    (tmp_path / "rm.json").write_text(json.dumps(settings))
    weights = model_weights(reward_model(), tmp_path / "tokenizer")
    return export_weights(weights, tmp_path / "export", reward_settings=tmp_path / "rm.json").folder


def test_an_export_carries_all_that_scoring_needs(exported, scorer, tmp_path):
    loaded = RewardScorer.load(exported)
    assert loaded.score(TALKS, DOMAINS) == pytest.approx(scorer().score(TALKS, DOMAINS), abs=1e-6)
    assert (loaded.statistics.mean, loaded.statistics.std) == (0.5, 2.0)
    again = export_weights(open_weights(exported), tmp_path / "again").folder  # converted, for instance to bfloat16
    assert read_reward_settings(again) == read_reward_settings(exported)
    # The released models have no reward.json: no conditions.
    (exported / REWARD_SETTINGS).unlink()
    plain = RewardScorer.load(exported)
    assert plain.statistics is None
    assert plain.score(TALKS[:1], ["anything"]) == pytest.approx(scorer().score(TALKS[:1], ["default"]), abs=1e-6)


def test_a_language_model_is_no_reward_model(small_shape, tokenizer, tmp_path):
    from internlm2.model import CausalLM

    tokenizer.save(tmp_path / "tokenizer")
    weights = model_weights(CausalLM.from_config(small_shape), tmp_path / "tokenizer")
    folder = export_weights(weights, tmp_path / "lm").folder
    with pytest.raises(ConfigError, match="it is a language model, not a reward model"):
        RewardScorer.load(folder)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pad", ["pad", "end", "reward"])
def test_transformers_agrees_whatever_the_padding(exported, scorer, tokenizer, side, pad):
    """Loaded through our registration, as AutoModel; the mask alone says where a sequence ends."""
    from transformers import AutoModel

    theirs = AutoModel.from_pretrained(exported, dtype=torch.float32)
    assert type(theirs).__name__ == "InternLM2ForRewardModel"
    assert theirs.reward_token_id == tokenizer.special_id("<|reward|>")
    rows = [
        [*render(CONDITIONS.apply(talk, domain), tokenizer).ids, theirs.reward_token_id]
        for talk, domain in zip(TALKS, DOMAINS)
    ]
    fill = {"pad": 0, "end": tokenizer.eos_id, "reward": theirs.reward_token_id}[pad]
    width = max(map(len, rows)) + 3
    gaps = [[fill] * (width - len(row)) for row in rows]
    padded = [gap + row if side == "left" else row + gap for row, gap in zip(rows, gaps)]
    mask = [
        [0] * len(gap) + [1] * len(row) if side == "left" else [1] * len(row) + [0] * len(gap)
        for row, gap in zip(rows, gaps)
    ]
    with torch.no_grad():
        found = theirs(torch.tensor(padded), attention_mask=torch.tensor(mask)).logits[:, 0].tolist()
    assert found == pytest.approx(scorer().score(TALKS, DOMAINS), abs=2e-5)


def test_the_methods_of_the_released_reward_models(exported, scorer):
    from transformers import AutoModel, AutoTokenizer

    model, tokenizer = AutoModel.from_pretrained(exported, dtype=torch.float32), AutoTokenizer.from_pretrained(exported)
    talks = [[{"role": turn.role, "content": turn.content} for turn in talk] for talk in TALKS]
    scores = scorer().score(TALKS, ["default"] * 4)
    assert model.get_scores(tokenizer, talks) == pytest.approx(scores, abs=2e-5)
    assert model.compare(tokenizer, talks[0], talks[1]) == (scores[0] > scores[1])


def test_a_tied_model_exports_no_output_matrix(small_shape, tmp_path):
    model = ScalarModel.from_config(replace(small_shape, tie_embeddings=True))
    folder = export_weights(model_weights(model), tmp_path / "export").folder
    assert open_weights(folder).dtypes.keys() == dict(model.named_parameters()).keys()
