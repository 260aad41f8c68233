"""The conditional reward model (report 4.2.1): pairs of answers, one score at the reward token, a condition by domain.

CPU         python train.py stage=rm model=tiny preset=demo
real model  python train.py stage=rm model=smollm2_135m data=gsm8k_solutions init_from=smollm2 adapter=lora name=smollm2
one GPU     python train.py stage=rm model=7b data=my_preferences init_from=/path/to/internlm2-chat-7b-sft adapter=qlora
"""

import logging
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console

from internlm2.config import Config, ConfigError, RewardConfig
from internlm2.data.pair_batch import PairBatch
from internlm2.data.preference_pairs import PreferencePairs
from internlm2.data.preference_stream import PreferenceStream
from internlm2.data.prepare import prepare
from internlm2.data.reward_sequence import REWARD_TOKEN, RewardSequences
from internlm2.engine.base import Engine, LossSum
from internlm2.engine.build import build_engine, prepare_device
from internlm2.model.adapters import add_adapters, describe, set_dropout_step
from internlm2.model.export import REWARD_SETTINGS
from internlm2.model.scalar import ScalarModel
from internlm2.rlhf.conditions import Conditions
from internlm2.rlhf.held_out_pairs import HeldOutPairs
from internlm2.rlhf.reward_loss import describe_result, reward_loss
from internlm2.run.directory import RunDirectory
from internlm2.stages.exporting import export_trained
from internlm2.stages.preparation import mark_finished, run_job, start_model
from internlm2.stages.reward_figures import figures, verdict_table
from internlm2.text.inherited_tokenizer import settle_tokenizer
from internlm2.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)


@dataclass
class Preferences:
    """The pairs of a stage: training batches, and the held-out ones (None where a source is too small for any)."""

    tokenizer: Tokenizer
    conditions: Conditions
    stream: PreferenceStream
    held_out: HeldOutPairs | None


def run(config: Config, directory: RunDirectory, console: Console) -> int:
    """One stage: build, resume, train, finish. Returns the exit code: 0, or 128 + the signal that stopped it."""
    settings = config.reward
    assert settings is not None  # config.checks has seen to it
    device = prepare_device(config.engine)
    data = load_preferences(config, settings, directory, console)
    model, weights = start_model(ScalarModel, config, device, data.tokenizer, directory)
    add_adapters(model, config.adapter, config.seed)
    if config.adapter.kind != "none":
        log.info(describe(model, config.adapter))
    engine = build_engine(model, config.engine, config.optim, config.train.total_steps, weights)
    pair_loss = reward_loss(settings)

    def loss(model: torch.nn.Module, batch: PairBatch) -> LossSum:
        set_dropout_step(model, engine.step)
        return pair_loss(model, batch)

    def validate() -> dict[str, Any]:
        found = data.held_out.judge(engine).domains if data.held_out else {}
        if found:
            log.info("step %d, held-out pairs\n%s", engine.step, verdict_table(found))
        return found

    job, stop = run_job(config, directory, console, engine, data.stream, loss, validate, describe_result)
    if stop.requested is not None:
        return stop.exit_code

    conclude(data, engine, directory)
    with engine.whole():
        if directory.writes:
            settings_file = directory.path / REWARD_SETTINGS
            export_trained(
                model, config, directory, reward_settings=settings_file, description="InternLM2ForRewardModel"
            )
    mark_finished(job)
    return 0


def load_preferences(config: Config, settings: RewardConfig, directory: RunDirectory, console: Console) -> Preferences:
    """Tokenize the sources, say what each holds, and settle how long the stage is."""
    config.data.tokenizer = settle_tokenizer(config, needs=REWARD_TOKEN)
    passes = {name: weight for name, weight in config.data.weights[config.stage.name].items() if weight > 0}
    tokenizer, corpus = prepare(config.data, config.model.vocab_size, console.is_terminal, passes)
    tokenizer.save(directory.path / "tokenizer")
    conditions = Conditions(settings.conditions if settings.conditional else {})
    domains = sorted({domain for shard in corpus.shards.values() for domain in shard.domains})
    conditions.check(domains)
    told = {domain: conditions.ids(domain, tokenizer) for domain in domains} if settings.conditional else {}
    sequences = RewardSequences(tokenizer, told, config.train.seq_len)
    pairs = PreferencePairs(corpus, list(passes), sequences, drop_long=config.data.long_conversations == "drop")
    stream = PreferenceStream(pairs, passes, config.train.batch_tokens, config.seed)
    if config.train.by_epochs:
        config.train.steps = stream.steps(config.train.epochs or 0)
    rows = [{**asdict(counts), "passes": passes[counts.source]} for counts in pairs.counts]
    for row in rows:
        log.info("data: %s", ", ".join(f"{key} {value}" for key, value in row.items()))
    directory.write_json("data.json", rows)
    held_out = HeldOutPairs(stream, settings, config.train.micro_batch) if len(pairs.held_out) else None
    if held_out is None and config.checkpoint.keep_best:
        raise ConfigError("checkpoint.keep_best=true needs held-out pairs: raise data.validation_fraction.")
    return Preferences(tokenizer, conditions, stream, held_out)


def conclude(data: Preferences, engine: Engine, directory: RunDirectory) -> None:
    """Judge the held-out pairs, also under wrong conditions; write the figures and reward.json, which PPO reads."""
    content: dict[str, Any] = {
        "reward_token_id": data.tokenizer.special_id(REWARD_TOKEN),
        "conditions": dict(data.conditions.texts),
        "score": None,
        "domains": {},
        "swap": {},
    }
    if data.held_out is None:
        log.warning("no pair is held out: data.validation_fraction is too small, and nothing is known of the scores.")
    else:
        judged = data.held_out.judge(engine, wrong_conditions=True)
        content |= {"score": judged.statistics(), "domains": judged.domains, "swap": judged.swap}
        content["blind_bound"] = data.held_out.blind_bound()
        log.info("held-out pairs\n%s", verdict_table(judged.domains, judged.swap))
        for name, figure in figures(directory, judged.domains, judged.swap).items():
            directory.write_json(f"evaluation/{name}.json", figure)
    directory.write_json(REWARD_SETTINGS, content)
