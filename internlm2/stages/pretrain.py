"""The pre-training stages: pretrain_4k, pretrain_32k (RoPE base 50,000 -> 1,000,000) and enhance (report 3.3).

CPU         python train.py stage=pretrain_4k model=tiny preset=demo
one GPU     python train.py stage=pretrain_4k model=1_8b data=my_corpus engine.recompute=full
next stage  python train.py stage=pretrain_32k model=1_8b data=my_corpus      goes on from its 4k stage
"""

import logging

import torch
from rich.console import Console

from internlm2.config import Config
from internlm2.config.start import initial_weights
from internlm2.data.batch import PackedBatch
from internlm2.engine.base import LossSum
from internlm2.engine.build import build_engine, prepare_device
from internlm2.engine.single import DTYPES
from internlm2.model.export import export_weights
from internlm2.model.transformer import CausalLM
from internlm2.model.weights import open_weights
from internlm2.run.directory import RunDirectory
from internlm2.stages import handover
from internlm2.stages.context_length import ContextLength
from internlm2.stages.preparation import load_data, mark_finished, run_job, start_model
from internlm2.stages.samples import write_completions

log = logging.getLogger(__name__)


def run(config: Config, directory: RunDirectory, console: Console) -> int:
    """One stage: build, resume, train, finish. Returns the exit code: 0, or 128 + the signal that stopped it."""
    device, dtype = prepare_device(config.engine), DTYPES[config.engine.dtype]
    data = load_data(config, directory, console)
    context = ContextLength(data.corpus, list(data.weights), data.length, config.validate.rows, directory)
    source = initial_weights(config)
    if source is not None and config.validate.compare_with_init:
        handover.check(source, config, data.tokenizer)
        context.measure_start(source, device, dtype, config.engine.attention)
    model, weights = start_model(CausalLM, config, device, data.tokenizer, directory)
    engine = build_engine(model, config.engine, config.optim, config.train.total_steps, weights)

    job, stop = run_job(
        config, directory, console, engine, data.stream, token_loss, lambda: data.held_out.measure(engine, token_loss)
    )
    if stop.requested is not None:
        return stop.exit_code

    with engine.whole():
        context.measure_end(model, config.stage.name)
        write_completions(model, data.tokenizer, config.run, config.generation, config.seed, directory, engine.step)
    if config.checkpoint.export and directory.writes:
        written = export_weights(open_weights(directory.path), directory.export, dtype=dtype, overwrite=True)
        log.info("exported to %s (official InternLM2 layout, %s)", written.folder, config.engine.dtype)
    mark_finished(job)
    return 0


def token_loss(model: torch.nn.Module, batch: PackedBatch) -> LossSum:
    """Next-token cross entropy, summed (nats)."""
    return LossSum(model(batch.ids, batch.cu_seqlens, batch.max_seqlen, batch.labels), batch.loss_tokens)
