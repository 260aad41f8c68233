"""What rounds of online RLHF ask to be done with models, so that the rounds themselves only decide and keep books."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internlm2.rlhf.annotation import Annotator
from internlm2.rlhf.answers import Answer

POLICIES = ("sft", "early", "late")
Score = Callable[[Sequence[Answer]], list[float]]


class Stopped(Exception):
    """A phase was stopped before its end; `code` is the exit code of the run. Starting again goes on."""

    def __init__(self, code: int, reason: str = "") -> None:
        super().__init__(reason)
        self.code = code


@dataclass(frozen=True)
class Work:
    """The phases' work on models. All of it is idempotent in the directory that it is given.

    `train_reward(directory, files, audit)`: a reward model on the base data and these files of preferences, or the
    audit model on its own share; returns where its weights are. `train_policy(directory, start, reward_model, round)`:
    one round of PPO. `checkpoints(directory)`: weights of its early and of its last policy. `answers(weights, prompts,
    seed)`: texts for a list of prompts (answers without text). `scorer(weights)`: a function that scores answers.
    `annotator(folder)`: who compares, or None. `gold`: the exact quality of an answer where it is known; it is
    reported, and nothing else. `shown(pair)`: a preference record as the reward model sees it. Of several ranks the
    `first` keeps the books; `total` sums a number over them.
    """

    train_reward: Callable[[Path, Sequence[Path], bool], Path]
    train_policy: Callable[[Path, Path, Path, int], None]
    checkpoints: Callable[[Path], tuple[Path, Path]]
    answers: Callable[[Path, Sequence[Answer], int], list[Answer]]
    scorer: Callable[[Path], Score]
    annotator: Callable[[Path], Annotator | None]
    prompts: Callable[[int], list[Answer]]
    fixed_prompts: list[Answer]
    gold: Callable[[Answer], float] | None = None
    signal: Callable[[Answer], float] | None = None
    shown: Callable[[dict[str, Any]], dict[str, Any]] = dict
    first: bool = True
    total: Callable[[float], float] = float

    def alone(self, action: Callable[[], Any]) -> None:
        """Have the first rank do something while the others wait. All raise Stopped where it does."""
        stopped: Stopped | None = None
        if self.first:
            try:
                action()
            except Stopped as error:
                stopped = error
        if self.total(float(stopped is not None)) > 0:
            raise stopped or Stopped(0)


@dataclass(frozen=True)
class Start:
    """What the first round starts from: the SFT weights and the reward model of the run."""

    sft: Path
    reward: Path
    seed: int
