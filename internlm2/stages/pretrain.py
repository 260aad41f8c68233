"""The pre-training stages: pretrain_4k, pretrain_32k (RoPE base 50,000 -> 1,000,000) and enhance (report 3.3).

CPU         python train.py stage=pretrain_4k model=tiny preset=demo
one GPU     python train.py stage=pretrain_4k model=1_8b data=my_corpus engine.recompute=full
next stage  python train.py stage=pretrain_32k model=1_8b data=my_corpus      goes on from its 4k stage
"""

import logging
from dataclasses import asdict
from typing import Any

import torch
from omegaconf import OmegaConf
from rich.console import Console

from internlm2.config import Config, ConfigError
from internlm2.data.batch import PackedBatch
from internlm2.data.prepare import prepare
from internlm2.data.stream import TokenStream
from internlm2.data.tokenizer import Tokenizer
from internlm2.data.usage import usage_table
from internlm2.engine.base import LossSum
from internlm2.engine.build import build_engine, prepare_device
from internlm2.engine.single import DTYPES
from internlm2.evaluate.held_out import HeldOut
from internlm2.model.export import export_weights
from internlm2.model.transformer import CausalLM
from internlm2.model.weights import open_weights
from internlm2.ops.attention import describe_backend
from internlm2.run.directory import RunDirectory
from internlm2.run.metrics import Metrics
from internlm2.run.provenance import record_end, record_start
from internlm2.run.throughput import Throughput, peak_flops
from internlm2.stages import handover
from internlm2.stages.context_length import ContextLength
from internlm2.stages.samples import write_samples
from internlm2.stages.supervised import Job, resume, train

log = logging.getLogger(__name__)


def run(config: Config, directory: RunDirectory, console: Console) -> int:
    """One stage: build, resume, train, finish. Returns the exit code: 0, or 128 + the signal that stopped it."""
    weights = {source: weight for source, weight in config.data.weights[config.stage.name].items() if weight > 0}
    seq_len, length = config.train.seq_len, config.validate.seq_len or config.train.seq_len
    device, dtype = prepare_device(config.engine), DTYPES[config.engine.dtype]
    tokenizer, corpus = prepare(config.data, config.model.vocab_size, console.is_terminal, weights)
    tokenizer.save(directory.path / "tokenizer")
    stream = TokenStream(corpus, weights, seq_len, config.data.packing, config.data.length_buckets, config.seed)
    show_data(stream, config.train.total_steps * config.train.rows_per_step, directory)
    context = ContextLength(corpus, list(weights), length, config.validate.rows, directory)
    model = build_model(config, device, tokenizer, context, directory)
    engine = build_engine(model, config.engine, config.optim, config.train.total_steps)
    held_out = HeldOut(corpus, tokenizer, list(weights), length, config.validate.rows)
    text = OmegaConf.to_yaml(OmegaConf.structured(config))
    job = Job(
        config=config,
        run=directory,
        engine=engine,
        stream=stream,
        loss=token_loss,
        validate=lambda: held_out.measure(engine, token_loss),
        throughput=Throughput(config.model, peak_of(device, config)),
        metrics=Metrics(directory, config.run.wandb, config=as_mapping(config)),
    )
    resumed = resume(job)
    record_start(directory, step=engine.step, config=text)
    log.info("%s step %d of %d", "resumed at" if resumed else "starts at", engine.step, config.train.total_steps)
    stop = train(job, console)
    if stop.requested is not None:
        log.warning(stop.message(engine.step))
        record_end(directory, step=engine.step, status="stopped")
        return stop.exit_code
    context.measure_end(model, config.stage.name)
    write_samples(model, tokenizer, config.run, config.seed, directory, engine.step)
    if config.checkpoint.export:
        written = export_weights(open_weights(directory.path), directory.export, dtype=dtype, overwrite=True)
        log.info("exported to %s (official InternLM2 layout, %s)", written.folder, config.engine.dtype)
    directory.write_json("finished.json", {"step": engine.step, "tokens": job.tokens})
    record_end(directory, step=engine.step, status="finished")
    return 0


def token_loss(model: torch.nn.Module, batch: PackedBatch) -> LossSum:
    """Next-token cross entropy, summed (nats)."""
    return LossSum(model(batch.ids, batch.cu_seqlens, batch.max_seqlen, batch.labels), batch.loss_tokens)


def show_data(stream: TokenStream, rows: int, directory: RunDirectory) -> None:
    """Say what each source and length bucket contributes, before anything is trained."""
    uses = stream.describe(rows)
    log.info("data\n%s", usage_table(uses))
    directory.write_json("data.json", [asdict(use) for use in uses])


def build_model(
    config: Config, device: torch.device, tokenizer: Tokenizer, context: ContextLength, directory: RunDirectory
) -> CausalLM:
    """Random or inherited weights, in fp32 until the engine casts them."""
    engine, dtype = config.engine, DTYPES[config.engine.dtype]
    try:
        log.info(describe_backend(device, dtype, config.model.head_dim, engine.attention))
    except ValueError as error:
        raise ConfigError(f"engine.attention={engine.attention}: {error}") from error
    source = handover.resolve(config)
    if source is not None and config.validate.compare_with_init:
        handover.check(source, config, tokenizer)
        context.measure_start(source, device, dtype, engine.attention)
    model = CausalLM.from_config(
        config.model,
        device=device,
        attention=engine.attention,
        recompute=engine.recompute,
        seed=config.seed if source is None else None,
    )
    origin = f"random, seed {config.seed}" if source is None else f"from {source}"
    log.info("model %s: %s parameters, %s", config.model.name, f"{config.model.parameters()['total']:,}", origin)
    if source is not None:
        directory.write_json("handover.json", handover.as_rows(handover.load(model, source, config, tokenizer)))
    return model


def as_mapping(config: Config) -> dict[str, Any]:
    """The config as plain dictionaries."""
    return asdict(config)


def peak_of(device: torch.device, config: Config) -> float | None:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return peak_flops(name, config.engine.dtype, config.run.peak_tflops)
