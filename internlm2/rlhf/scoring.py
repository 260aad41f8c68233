"""Scores of conversations by a trained reward model, for PPO, evaluation and anybody else."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from internlm2.config import ConfigError
from internlm2.data.reward_sequence import RewardSequences
from internlm2.model.export import REWARD_SETTINGS
from internlm2.model.scalar import last_positions, load_scalar_model
from internlm2.model.weights import open_weights
from internlm2.rlhf.conditions import Conditions
from internlm2.text.chat import Message, render
from internlm2.text.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class ScoreStatistics:
    """Of the scores of held-out pairs, chosen and rejected ones together, each under its own condition."""

    mean: float
    std: float


class RewardScorer:
    """A reward model with its tokenizer and conditions; `model` is a ScalarModel or anything that is called like one.

    The score of a conversation depends on nothing but the conversation and its domain: sequences are packed without
    padding, and the reward token's place comes from their lengths. `statistics` is None where nothing is known.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        conditions: Conditions,
        *,
        statistics: ScoreStatistics | None = None,
        seq_len: int = 8192,
        batch_tokens: int = 16384,
    ) -> None:
        self.model, self.tokenizer, self.conditions, self.statistics = model, tokenizer, conditions, statistics
        self.batch_tokens = batch_tokens
        told = {domain: conditions.ids(domain, tokenizer) for domain in conditions.texts}
        self.sequences = RewardSequences(tokenizer, told, seq_len)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        attention: str = "auto",
        seq_len: int | None = None,
        batch_tokens: int = 16384,
    ) -> "RewardScorer":
        """From the run directory or the export of a reward model, ours or a released one.

        Without a reward.json (the released models have none) there are no conditions and no statistics. ConfigError
        where it is no reward model.
        """
        folder = Path(path)
        weights = open_weights(folder)
        if weights.tokenizer is None:
            raise ConfigError(f"{folder} has no tokenizer beside its weights: a reward model needs its own.")
        model = load_scalar_model(folder, device=device, dtype=dtype, attention=attention)
        model.eval().requires_grad_(False)
        settings = read_reward_settings(folder)
        score = settings.get("score")
        return cls(
            model,
            load_tokenizer(weights.tokenizer),
            Conditions(settings.get("conditions", {})),
            statistics=None if score is None else ScoreStatistics(score["mean"], score["std"]),
            seq_len=seq_len or min(8192, weights.config.max_position_embeddings),
            batch_tokens=batch_tokens,
        )

    @torch.no_grad()
    def score(self, conversations: Sequence[Sequence[Message]], domains: Sequence[str]) -> list[float]:
        """One score for each conversation, whose last turn is the assistant's, under the condition of its domain.

        Too long an answer is cut before its end (`RewardSequences`). ConfigError for a domain without a condition.
        """
        if len(conversations) != len(domains):
            raise ValueError(f"{len(conversations)} conversations came with {len(domains)} domains.")
        self.conditions.check(set(domains))
        rows = []
        for turns, domain in zip(conversations, domains):
            if not turns or turns[-1].role != "assistant":
                raise ValueError("A conversation to score must end with a turn of the assistant.")
            rows.append(self.sequences.ids(np.array(render(turns, self.tokenizer).ids, np.int64), domain))
        was_training = self.model.training
        self.model.eval()
        scores = [score for part in self._parts(rows) for score in self._forward(part)]
        self.model.train(was_training)
        return scores

    def _parts(self, rows: Sequence[np.ndarray]) -> list[list[np.ndarray]]:
        parts: list[list[np.ndarray]] = []
        used = 0
        for row in rows:
            if not parts or used + len(row) > self.batch_tokens:
                parts.append([])
                used = 0
            parts[-1].append(row)
            used += len(row)
        return parts

    def _forward(self, rows: Sequence[np.ndarray]) -> list[float]:
        device = next(iter(self.model.parameters())).device
        lengths = np.array([len(row) for row in rows])
        bounds = torch.from_numpy(np.concatenate([[0], lengths.cumsum()]).astype(np.int32)).to(device)
        ids = torch.from_numpy(np.concatenate(rows)).to(device)
        scores: list[float] = self.model(ids, bounds, int(lengths.max()), last_positions(bounds)).tolist()
        return scores


def read_reward_settings(path: Path) -> dict[str, Any]:
    """reward.json of a run directory, of the run of a checkpoint folder, or of an export; {} where there is none."""
    for folder in (path, path.parent.parent):
        if (folder / REWARD_SETTINGS).is_file():
            try:
                return dict(json.loads((folder / REWARD_SETTINGS).read_text(encoding="utf-8")))
            except (ValueError, TypeError) as error:
                raise ConfigError(f"{folder / REWARD_SETTINGS} is no JSON object: {error}.") from error
    return {}
