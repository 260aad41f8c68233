"""What the rounds of online RLHF do with models: train a reward model on more data, train a policy, answer, score."""

import copy
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from internlm2.config import Config, ConfigError, SourceConfig
from internlm2.config.compose import to_config
from internlm2.config.ppo import PPOConfig
from internlm2.config.rounds import RoundsConfig
from internlm2.data.prompts import Prompt, PromptStream
from internlm2.engine.build import prepare_device
from internlm2.engine.process_group import sum_over_ranks
from internlm2.engine.single import DTYPES
from internlm2.generation.build import build_generator
from internlm2.generation.parameters import SamplingParams
from internlm2.model.weights import load_model, open_weights
from internlm2.rlhf.annotation import Annotator, EndpointAnnotator, FileAnnotator, FunctionAnnotator, ScoreAnnotator
from internlm2.rlhf.answers import Answer
from internlm2.rlhf.rewards import ModelReward, RuleReward
from internlm2.rlhf.rollout import Sample
from internlm2.rlhf.scoring import RewardScorer
from internlm2.run.directory import RunDirectory
from internlm2.run.ranks import from_environment
from internlm2.stages import reward
from internlm2.stages.ppo_round import run_round
from internlm2.stages.preparation import is_complete
from internlm2.stages.round_work import Score, Stopped, Work
from internlm2.text.chat import Message, parse_reply, render
from internlm2.text.tokenizer import load_tokenizer

log = logging.getLogger(__name__)

# Where the prompts of a round's collection begin in the stream: far behind those that PPO trains on.
_COLLECTION = 1 << 40
_ROUND = 1 << 32


@dataclass(frozen=True)
class RoundModels:
    """The work of the rounds of one run. `sft`: the reference of every round; `reward`: the run's own reward model."""

    config: Config
    console: Console
    sft: Path
    reward: Path

    @property
    def ppo(self) -> PPOConfig:
        """The group ppo, which stage=ppo has."""
        assert self.config.ppo is not None
        return self.config.ppo

    @property
    def rounds(self) -> RoundsConfig:
        """The group rounds, which stage=ppo has."""
        assert self.config.rounds is not None
        return self.config.rounds

    def work(self) -> Work:
        """The functions that the rounds call."""
        assert self.config.prompts is not None
        rules = self.ppo.validation.gold, self.rounds.signal
        gold, signal = (None if name is None else _rule(name) for name in rules)
        prompts = PromptStream(self.config.prompts, self.config.seed)
        return Work(
            train_reward=self.train_reward,
            train_policy=self.train_policy,
            checkpoints=self.checkpoints,
            answers=self.answers,
            scorer=self.scorer,
            annotator=self.annotator,
            prompts=lambda number: self._collection(prompts, number),
            fixed_prompts=[_asked(prompt) for prompt in prompts.held_out(self.ppo.validation.rows)],
            gold=gold,
            signal=signal,
            shown=self.shown,
            first=from_environment().is_first,
            total=lambda value: sum_over_ranks([value])[0],
        )

    def has_audit(self) -> bool:
        """Is there an audit model? As the config says or, if it says nothing, where the data have pairs for it."""
        if self.rounds.audit.enabled is not None:
            return self.rounds.audit.enabled
        found = (self.reward / "config.yaml").is_file() and "audit" in load_run_config(self.reward).data.weights
        if not found:
            log.info("no audit model: the reward model's data have no data.weights.audit")
        return found

    def shown(self, pair: dict[str, Any]) -> dict[str, Any]:
        """A preference record as the reward model sees it: without the policy's system turn where that is dropped."""
        keeps = self.ppo.reward.system_turn == "keep"
        return pair | {"prompt": [turn for turn in pair["prompt"] if keeps or turn["role"] != "system"]}

    def train_reward(self, directory: Path, files: Sequence[Path], audit: bool) -> Path:
        """Train as the run's reward model was trained, from the same start, on its data and `files`."""
        config = self.reward_config(files, audit)
        run = self._directory(directory)
        if not _complete(run, config):
            log.info("%s, in %s", "the audit model" if audit else "the reward model", directory)
            code = reward.run(config, run, self.console)
            if code:
                raise Stopped(code)
        return directory

    def reward_config(self, files: Sequence[Path], audit: bool) -> Config:
        """The config that the run's reward model was trained with, and the sources that `files` are."""
        config = load_run_config(self.reward)
        weights, stage = config.data.weights, config.stage.name
        if audit:
            if "audit" not in weights:
                raise ConfigError(
                    f"rounds.audit.enabled=true needs data.weights.audit in the config of {self.reward}: sources of "
                    f"pairs that are not in data.weights.{stage}. Or set rounds.audit.enabled=false."
                )
            shared = [name for name, w in weights["audit"].items() if w > 0 and weights[stage].get(name, 0) > 0]
            if shared:
                raise ConfigError(
                    f"data.weights.audit and data.weights.{stage} share {', '.join(shared)}: the audit model must see "
                    "other pairs than the one that it watches."
                )
            weights[stage] = dict(weights["audit"])
            config.seed += 1
        # New pairs are all seen, also where the stage is shorter than an epoch.
        passes = max(1.0, 1.0 / (config.train.epochs or 1.0))
        for file in files:
            config.data.sources[file.stem] = SourceConfig(kind="preferences", path=str(file))
            weights[stage][file.stem] = passes
        if config.train.epochs:
            config.train.steps = config.train.tokens = None  # as many steps as the larger data take
        return config

    def train_policy(self, directory: Path, start: Path, reward_model: Path, number: int) -> None:
        """One round of PPO in `directory`, on prompts that no round before has seen."""
        run = self._directory(directory)
        config = copy.deepcopy(self.config)
        if _complete(run, config):
            return
        config.checkpoint.keep_every = self.early_step()
        result = run_round(
            config,
            run,
            self.console,
            policy=start,
            reference=self.sft,
            reward=reward_model,
            first_prompt=(number - 1) * self._iterations() * self.ppo.prompts_per_iteration,
        )
        if result.code:
            raise Stopped(result.code)

    def early_step(self) -> int:
        """Iteration of the early checkpoint, at a multiple of checkpoint.every so that it is saved."""
        ppo, every = self.ppo, self.config.checkpoint.every or 1
        return max(1, round((ppo.critic_warmup + self.rounds.early * ppo.iterations) / every)) * every

    def checkpoints(self, directory: Path) -> tuple[Path, Path]:
        """The early checkpoint and the exported policy of a round."""
        return directory / "checkpoints" / f"step_{self.early_step():08d}", directory / "export"

    def answers(self, weights: Path, prompts: Sequence[Answer], seed: int) -> list[Answer]:
        """One sampled answer to each prompt, with PPO's sampling parameters."""
        rollout, device = self.ppo.rollout, prepare_device(self.config.engine)
        tokenizer = load_tokenizer(_tokenizer_folder(weights))
        model = load_model(weights, device=device, dtype=DTYPES[self.config.engine.dtype])
        model.eval()
        params = SamplingParams(
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            top_k=rollout.top_k,
            max_new_tokens=rollout.max_new_tokens,
            stop_ids=(tokenizer.eos_id, tokenizer.special_id("<|im_end|>")),
            seed=seed,
        )
        ids = [render(prompt.prompt, tokenizer, generation_prompt=True).ids for prompt in prompts]
        drawn = build_generator(model, self.config.generation, tokenizer.vocab_size).generate(ids, params)
        return [
            replace(
                prompts[answer.prompt],
                text=parse_reply(answer.tokens, tokenizer).content,
                tokens=len(answer.tokens),
                ended=answer.finish == "stop",
            )
            for answer in drawn
        ]

    def scorer(self, weights: Path) -> Score:
        """A reward model, as PPO asks it."""
        device = prepare_device(self.config.engine)
        model = RewardScorer.load(weights, device=device, dtype=DTYPES[self.config.engine.dtype])
        judge = ModelReward(model, self.ppo.reward.system_turn)
        return lambda answers: judge([_sample(answer) for answer in answers])

    def annotator(self, folder: Path) -> Annotator | None:
        """Who compares answers, as rounds.annotation says."""
        settings, seed = self.rounds.annotation, self.config.seed
        if settings.kind == "files":
            return FileAnnotator(folder)
        if settings.kind == "function":
            return FunctionAnnotator(_rule(str(settings.function)), settings.temperature, seed)
        if settings.kind == "reward_model":
            return ScoreAnnotator(self.scorer(Path(str(settings.reward_model))))
        if settings.kind == "endpoint":
            conditions = json.loads((self.reward / "reward.json").read_text(encoding="utf-8"))["conditions"]
            return EndpointAnnotator(str(settings.endpoint), str(settings.endpoint_model), conditions)
        return None

    def _collection(self, prompts: PromptStream, number: int) -> list[Answer]:
        first = _COLLECTION + number * _ROUND
        return [_asked(prompts[first + place]) for place in range(self.rounds.prompts)]

    def _directory(self, path: Path) -> RunDirectory:
        return RunDirectory(path, writes=from_environment().is_first)

    def _iterations(self) -> int:
        return self.ppo.critic_warmup + self.ppo.iterations


def _complete(run: RunDirectory, config: Config) -> bool:
    """Has the first rank found the run complete?"""
    return sum_over_ranks([float(run.writes and is_complete(run, config))])[0] > 0


def load_run_config(run: Path) -> Config:
    """The composed config that a run was started with. ConfigError where there is none."""
    file = run / "config.yaml"
    if not file.is_file():
        raise ConfigError(
            f"ppo.reward.model: {run} has no config.yaml that says how it was trained, so that it cannot be trained "
            "again between rounds. Name the run directory of stage=rm, or set rounds.count=1."
        )
    values = OmegaConf.create(yaml.safe_load(file.read_text(encoding="utf-8")))
    merged = OmegaConf.merge(OmegaConf.structured(Config), values)
    assert isinstance(merged, DictConfig)
    return to_config(merged)


def _rule(name: str) -> Callable[[Answer], float]:
    rule = RuleReward(name)
    return lambda answer: rule([_sample(answer)])[0]


def _sample(answer: Answer) -> Sample:
    prompt = Prompt(answer.prompt, answer.domain, answer.reference)
    reply = Message("assistant", answer.text)
    return Sample(prompt, answer.text, [0] * answer.tokens, "stop" if answer.ended else "length", reply)


def _asked(prompt: Prompt) -> Answer:
    return Answer(prompt.turns, prompt.domain, "", 0, False, "", reference=prompt.reference)


def _tokenizer_folder(weights: Path) -> Path:
    folder = open_weights(weights).tokenizer
    if folder is None:
        raise ConfigError(f"{weights} has no tokenizer beside its weights.")
    return folder
