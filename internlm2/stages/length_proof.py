"""Measures what the long-context stage gained (report 3.3.2 and the needle maps of 5.2.3); trains nothing.

All stages  python train.py stage=recipe experiment=length_proof
this one    python train.py stage=length_proof experiment=length_proof     on the stages that are there
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from omegaconf import OmegaConf
from rich.console import Console

from internlm2.config import Config, ConfigError, RopeScalingConfig
from internlm2.config.length_proof import LengthProofConfig
from internlm2.engine.build import prepare_device
from internlm2.engine.single import DTYPES
from internlm2.evaluate.needle import Answer, Haystacks, Question, ask, needle_map
from internlm2.evaluate.needle_suite import map_result
from internlm2.evaluate.results import Headline, Result, save
from internlm2.evaluate.scoring import Group, score
from internlm2.generation import Engine
from internlm2.model.transformer import CausalLM
from internlm2.model.weights import load_model, open_weights
from internlm2.run.directory import RunDirectory
from internlm2.run.provenance import record_end, record_start
from internlm2.text.tokenizer import Tokenizer, load_tokenizer

log = logging.getLogger(__name__)

LANGUAGE = "english"
LOSS_DEPTHS = (0.0, 50.0, 100.0)


def run(config: Config, directory: RunDirectory, console: Console) -> int:
    """Maps and losses of both stages and of the second with dynamic NTK. Returns 0."""
    settings = config.length_proof
    if settings is None or not settings.multiples or not settings.depths:
        raise ConfigError("stage=length_proof needs length_proof.multiples and length_proof.depths.")
    device, dtype = prepare_device(config.engine), DTYPES[config.engine.dtype]
    record_start(directory, step=0, config=OmegaConf.to_yaml(OmegaConf.structured(config)))
    sources = {stage: directory.path.parent / stage for stage in (settings.before, settings.after)}
    for stage, source in sources.items():
        if not source.exists():
            raise ConfigError(f"stage=length_proof measures {source}, which is not there: run stage={stage} first.")
    tokenizer = tokenizer_of(sources[settings.after])
    before, after = (load_model(source, device=device, dtype=dtype).eval() for source in sources.values())
    models = {
        settings.before: before,
        settings.after: after,
        f"{settings.after} with dynamic NTK": with_dynamic_ntk(after, settings.ntk_factor),
    }
    results = measure(models, tokenizer, settings, config.seed, config.generation.kv_tokens)
    for result in results:
        save(result, directory.evaluation, str(directory.path.parent), settings)
        log.info("%s", result.text())
    directory.write_json("finished.json", {"step": config.train.total_steps, "tokens": 0, "epochs": None})
    record_end(directory, step=0, status="finished")
    return 0


def tokenizer_of(source: Path) -> Tokenizer:
    """The tokenizer that a stage left."""
    folder = open_weights(source).tokenizer
    if folder is None:
        raise ConfigError(f"{source} comes without a tokenizer.")
    return load_tokenizer(folder)


def with_dynamic_ntk(model: CausalLM, factor: float) -> CausalLM:
    """The same weights, whose RoPE base grows with sequences longer than those of training."""
    scaling = RopeScalingConfig(kind="dynamic", factor=factor)
    weight = model.output_weight
    twin = CausalLM.from_config(
        replace(model.config, rope_scaling=scaling), device=weight.device, dtype=weight.dtype, seed=None
    )
    twin.load_state_dict(model.state_dict())
    return twin.eval()


@torch.no_grad()
def measure(
    models: dict[str, CausalLM], tokenizer: Tokenizer, settings: LengthProofConfig, seed: int, kv_tokens: int
) -> list[Result]:
    """A needle map for each model, and one figure of each kind that compares them."""
    haystacks = Haystacks(tokenizer, chat=True)
    base, longest_trained = (trained_to(model) for model in list(models.values())[:2])
    lengths = sorted({multiple * length for multiple in settings.multiples for length in (base, longest_trained)})
    answers: dict[str, list[Answer]] = {}
    losses: dict[str, list[float]] = {}
    for label, model in models.items():
        started = time.perf_counter()
        longest = max(settings.multiples) * trained_to(model)
        mine = [length for length in lengths if length <= longest]
        questions = [
            question
            for length in mine
            for question in haystacks.questions(
                LANGUAGE, length, settings.depths, repeats_at(length, longest_trained, settings.repeats), seed
            )
        ]
        engine = Engine(
            model, kv_tokens=max(kv_tokens, 2 * longest), max_length=2 * longest, vocab_size=tokenizer.vocab_size
        )
        answers[label] = ask(engine, tokenizer, questions, chat=True)
        losses[label] = answer_losses(model, tokenizer, haystacks, mine, seed)
        log.info("%s: %d needles in %.0f s", label, len(questions), time.perf_counter() - started)
    maps = [
        replace(map_result(found, f"needle_{number}", LANGUAGE, trained_to(models[label]), seed), headline=[])
        for number, (label, found) in enumerate(answers.items(), 1)
    ]
    for result, label in zip(maps, models, strict=True):
        result.title = f"Needle in a haystack: {label}"
    return [comparison(models, answers), loss_figure(models, losses, lengths), *maps]


def repeats_at(length: int, trained: int, repeats: int) -> int:
    """Haystacks in each cell: an equal number of tokens for all lengths beyond those of training."""
    return max(1, repeats * min(length, trained) // length)


def answer_losses(
    model: CausalLM, tokenizer: Tokenizer, haystacks: Haystacks, lengths: Sequence[int], seed: int
) -> list[float]:
    """Mean loss (nats a token) of the right secret after a prompt of each length."""
    means = []
    for length in lengths:
        groups = [
            answer_group(tokenizer, question)
            for question in haystacks.questions(LANGUAGE, length, LOSS_DEPTHS, 1, seed + 1)
        ]
        scored = [one for scores in score(model, groups) for one in scores]
        means.append(-sum(one.total for one in scored) / sum(len(one.logprobs) for one in scored))
    return means


def answer_group(tokenizer: Tokenizer, question: Question) -> Group:
    """The question and the beginning of its answer as context, the secret as continuation."""
    context = [*question.ids, *tokenizer.encode(question.needle.prompt)]
    return Group(context, [tokenizer.encode(question.needle.answer)])


def comparison(models: dict[str, CausalLM], answers: dict[str, list[Answer]]) -> Result:
    """Share of needles found by length, one line a model; what is within and beyond the length of training."""
    series, headline = [], []
    for label, found in answers.items():
        mapped, limit = needle_map(found), trained_to(models[label])
        series.append({"label": label, "x": mapped.lengths, "y": [mapped.at(length) for length in mapped.lengths]})
        for words, lengths in (
            ("within", [length for length in mapped.lengths if length <= limit]),
            ("beyond", [length for length in mapped.lengths if length > limit]),
        ):
            if lengths:
                mean = sum(mapped.at(length) for length in lengths) / len(lengths)
                headline.append(Headline(f"needles found {words} {limit:,} tokens, {label}", mean))
    return Result(
        name="needle_by_length",
        title="Needles found by length, mean over depths",
        figure={"x_label": "length (tokens)", "y_label": "share found", "x_scale": "log", "series": series},
        headline=headline,
        note=f"Trained to {', '.join(f'{trained_to(model):,} ({label})' for label, model in models.items())} tokens.",
    )


def loss_figure(models: dict[str, CausalLM], losses: dict[str, list[float]], lengths: Sequence[int]) -> Result:
    """Loss of the secret by its position, one line a model."""
    series = [{"label": label, "x": list(lengths[: len(found)]), "y": found} for label, found in losses.items()]
    return Result(
        name="loss_by_length",
        title="Loss of the secret by its position",
        figure={"x_label": "position (tokens)", "y_label": "nats a token", "x_scale": "log", "series": series},
    )


def trained_to(model: CausalLM) -> int:
    """Tokens of the longest rows in training."""
    return model.config.max_position_embeddings
