"""What every supervised stage builds before its first step: data, model, and the job that the loop runs."""

import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch
from omegaconf import OmegaConf
from rich.console import Console

from internlm2.config import Config, ConfigError, DataConfig
from internlm2.config.start import initial_weights
from internlm2.data.corpus import Corpus
from internlm2.data.prepare import prepare
from internlm2.data.stream import TokenStream
from internlm2.data.usage import usage_table
from internlm2.engine.base import Engine, LossFunction, StepResult
from internlm2.engine.build import place_of_new_model
from internlm2.engine.single import DTYPES
from internlm2.evaluate.held_out import HeldOut
from internlm2.generation.build import describe_generation
from internlm2.model.scalar import ScalarModel
from internlm2.model.transformer import CausalLM
from internlm2.model.values import Values, random_values
from internlm2.ops.attention import describe_backend
from internlm2.ops.processor import describe_products
from internlm2.run.directory import RunDirectory
from internlm2.run.metrics import Metrics
from internlm2.run.provenance import record_end, record_start
from internlm2.run.signals import StopSignals
from internlm2.run.throughput import FORMULA, Throughput, peak_flops
from internlm2.stages import handover
from internlm2.stages.supervised import Job, Stream, loss_tokens, resume, train
from internlm2.text.inherited_tokenizer import settle_tokenizer
from internlm2.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)


@dataclass
class Data:
    """The tokenized corpus of a stage, its mixture, the training rows and the held-out ones (`length` tokens each)."""

    tokenizer: Tokenizer
    corpus: Corpus
    weights: dict[str, float]
    stream: TokenStream
    held_out: HeldOut
    length: int


def load_data(config: Config, directory: RunDirectory, console: Console) -> Data:
    """Tokenize what the stage's mixture names, say what it will take from each source, and settle its length."""
    settings, length = config.data, config.validate.seq_len or config.train.seq_len
    settings.tokenizer = settle_tokenizer(config)
    weights = {source: weight for source, weight in settings.weights[config.stage.name].items() if weight > 0}
    tokenizer, corpus = prepare(settings, config.model.vocab_size, console.is_terminal, weights)
    if directory.writes:
        tokenizer.save(directory.path / "tokenizer")
    stream = open_stream(settings, corpus, weights, config)
    if config.train.by_epochs:
        config.train.tokens = round(
            (config.train.epochs or 0) * sum(use.tokens_per_epoch for use in stream.describe(0))
        )
    uses = stream.describe(config.train.total_steps * config.train.rows_per_step)
    log.info("data\n%s", usage_table(uses))
    directory.write_json("data.json", [asdict(use) for use in uses])
    held_out = HeldOut(corpus, tokenizer, list(weights), length, config.validate.rows)
    return Data(tokenizer, corpus, weights, stream, held_out, length)


def open_stream(settings: DataConfig, corpus: Corpus, weights: dict[str, float], config: Config) -> TokenStream:
    return TokenStream(
        corpus,
        weights,
        config.train.seq_len,
        settings.packing,
        settings.length_buckets,
        config.seed,
        settings.long_conversations,
    )


Model = TypeVar("Model", CausalLM, ScalarModel)


def start_model(
    kind: type[Model], config: Config, device: torch.device, tokenizer: Tokenizer, directory: RunDirectory
) -> tuple[Model, Values | None]:
    """A CausalLM or ScalarModel with random or inherited weights, in fp32 until the engine casts them; for ZeRO, where
    no adapters come in between, a model without memory and its weights in pieces. Writes handover.json.
    """
    engine, dtype = config.engine, DTYPES[config.engine.dtype]
    try:
        log.info(describe_backend(device, dtype, config.model.head_dim, engine.attention))
        log.info(describe_products(device, dtype))
        log.info(describe_generation(config.generation, device))
    except ValueError as error:
        raise ConfigError(f"engine.attention={engine.attention}: {error}") from error
    source = initial_weights(config)
    model = kind.from_config(
        config.model,
        device=place_of_new_model(engine, device, adapted=config.adapter.kind != "none"),
        attention=engine.attention,
        recompute=engine.recompute,
        seed=config.seed if source is None else None,
    )
    origin = f"random, seed {config.seed}" if source is None else f"from {source}"
    log.info("model %s: %s parameters, %s", config.model.name, f"{config.model.parameters()['total']:,}", origin)
    if source is not None:
        values, table = handover.load(model, source, config, tokenizer)
        directory.write_json("handover.json", handover.as_rows(table))
        return model, values
    on_demand = next(model.parameters()).is_meta
    return model, random_values(model, config.model, config.seed) if on_demand else None


def run_job(
    config: Config,
    directory: RunDirectory,
    console: Console,
    engine: Engine,
    stream: Stream,
    loss: LossFunction,
    validate: Callable[[], dict[str, Any]],
    measures: Callable[[StepResult], dict[str, Any]] = loss_tokens,
) -> tuple[Job, StopSignals]:
    """Resume where there is something to resume, and train to the end or a signal."""
    text = OmegaConf.to_yaml(OmegaConf.structured(config))
    peak = peak_flops(device_name(engine.device), config.engine.dtype, config.run.peak_tflops)
    if peak is not None:
        log.info(FORMULA)
    job = Job(
        config=config,
        run=directory,
        engine=engine,
        stream=stream,
        loss=loss,
        validate=validate,
        throughput=Throughput(
            config.model, peak, devices=engine.world_size, outputs=1 if config.stage.kind == "reward" else None
        ),
        metrics=Metrics(directory, config.run.wandb, config=asdict(config), enabled=directory.writes),
        measures=measures,
    )
    resumed = resume(job)
    record_start(directory, step=engine.step, config=text)
    log.info("%s step %d of %d", "resumed at" if resumed else "starts at", engine.step, config.train.total_steps)
    stop = train(job, console)
    if stop.requested is not None:
        log.warning(stop.message(engine.step))
        record_end(directory, step=engine.step, status="stopped")
    return job, stop


def mark_finished(job: Job) -> None:
    """The stage is complete: `stage=recipe` skips it from now on."""
    finished = {"step": job.engine.step, "tokens": job.tokens, "epochs": job.config.train.epochs}
    job.run.write_json("finished.json", finished)
    record_end(job.run, step=job.engine.step, status="finished")
    job.metrics.close()


def is_complete(directory: RunDirectory, config: Config) -> bool:
    """Has the stage run to its last step or round? A longer stage than before goes on from there."""
    mark = directory.path / "finished.json"
    if not mark.exists():
        return False
    finished = json.loads(mark.read_text(encoding="utf-8"))
    if "rounds" in finished and config.rounds is not None:
        return finished["rounds"] >= config.rounds.count
    if config.train.by_epochs:
        return (finished["epochs"] or 0) >= (config.train.epochs or 0)
    return finished["step"] >= config.train.total_steps


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
