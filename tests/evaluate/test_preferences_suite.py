"""Accuracy on preference pairs, for a scorer whose scores are known."""

import json

import pytest
import torch

from internlm2.config import ConfigError
from internlm2.config.compose import compose_evaluation
from internlm2.evaluate import preferences
from internlm2.rlhf.conditions import Conditions
from internlm2.rlhf.scoring import RewardScorer


class Longest(torch.nn.Module):
    """Scores a sequence by its length, or by minus that where it begins as a conversation with a condition."""

    def __init__(self, condition: int):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.condition = condition

    def forward(self, ids, bounds, longest=None, at=None):
        values = torch.zeros(len(ids))
        for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist()):
            sign = -1.0 if self.condition in ids[start:end].tolist() else 1.0
            values[end - 1] = sign * (end - start)
        return values if at is None else values[at]


@pytest.fixture
def pairs(tmp_path):
    lines = [
        {"prompt": "Say it.", "chosen": "a long answer it is", "rejected": "short", "domain": "long"},
        {"prompt": "Say it.", "chosen": "short", "rejected": "a long answer it is", "domain": "brief"},
        {"prompt": "Say more.", "ranked": ["tiny", "somewhat longer", "the longest of them all"], "domain": "brief"},
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return path


def test_accuracy_by_domain_with_and_without_conditions(pairs, tokenizer, monkeypatch):
    marker = tokenizer.encode("#")[0]
    conditions = Conditions({"long": "Be long.", "brief": "Be brief #"})
    scorer = RewardScorer(Longest(marker), tokenizer, conditions, seq_len=256)
    monkeypatch.setattr(RewardScorer, "load", classmethod(lambda cls, *args, **keys: scorer))
    (result,) = preferences.run("rm", compose_evaluation(["suite=preferences", f"suite.path={pairs}"]))
    rows = {row["domain"]: row for row in result.rows}
    assert rows["brief"]["pairs"] == 4
    assert rows["brief"]["accuracy with conditions"] == 1.0
    assert rows["brief"]["accuracy without conditions"] == 0.0
    assert rows["long"]["accuracy without conditions"] == 1.0
    assert rows["all of them"]["accuracy without conditions"] == 0.2
    assert result.headline[0].value == 1.0
    keys = ["suite=preferences", f"suite.path={pairs}", "suite.conditions=false"]
    (plain,) = preferences.run("rm", compose_evaluation(keys))
    assert plain.headline[0].value == 0.2


def test_a_record_without_a_pair_is_named(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "x", "chosen": "same", "rejected": "same"}\n{"prompt": "x"}\n')
    with pytest.raises(ConfigError, match=r"pairs.jsonl:[12]: "):
        preferences.run("rm", compose_evaluation(["suite=preferences", f"suite.path={path}"]))
