"""The pre-training stages: pretrain_4k, pretrain_32k (RoPE base 50,000 -> 1,000,000) and enhance (report 3.3).

    CPU         python train.py stage=pretrain_4k model=tiny preset=demo
    one GPU     python train.py stage=pretrain_4k model=1_8b data=my_corpus engine.recompute=full
    next stage  python train.py stage=pretrain_32k model=1_8b data=my_corpus      (the same name=: goes on from the 4k stage)
"""

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from rich.console import Console

from internlm2.config import Config, ConfigError
from internlm2.data.batch import PackedBatch
from internlm2.data.corpus import Corpus
from internlm2.data.prepare import prepare
from internlm2.data.stream import TokenStream
from internlm2.data.tokenizer import Tokenizer
from internlm2.data.validation import long_validation_rows
from internlm2.engine.base import LossSum
from internlm2.engine.single import DTYPES, SingleEngine
from internlm2.evaluate.held_out import HeldOut
from internlm2.evaluate.position import LossByPosition, loss_by_position
from internlm2.model.export import export
from internlm2.model.generate import generate
from internlm2.model.transformer import CausalLM
from internlm2.model.weights import read_weights
from internlm2.ops.attention import describe_backend
from internlm2.run.console import quantity
from internlm2.run.directory import RunDirectory
from internlm2.run.metrics import Metrics
from internlm2.run.provenance import record_end, record_start
from internlm2.run.report import write_stage_report
from internlm2.run.throughput import Throughput, peak_flops
from internlm2.stages import handover
from internlm2.stages.device import choose_device
from internlm2.stages.supervised import Job, resume, train

log = logging.getLogger(__name__)


def run(config: Config, directory: RunDirectory, console: Console) -> int:
    """One stage: build, resume, train, finish. Returns the exit code: 0, or 128 + the signal that stopped it."""
    device = choose_device(config.engine)
    tokenizer, corpus = prepare(config.data, config.model.vocab_size, progress=console.is_terminal, sources=sources_of(config))
    tokenizer.save(directory.path / "tokenizer")
    stream = TokenStream(
        corpus, weights_of(config), config.train.seq_len, config.data.packing, config.data.length_buckets, config.seed
    )
    total_steps = steps_of(config)
    show_data(stream, total_steps * config.train.batch_tokens // config.train.seq_len, directory)
    model = build_model(config, device, tokenizer, corpus, directory)
    engine = SingleEngine(
        model, config.optim, total_steps, device, config.engine.dtype,
        config.engine.on_nonfinite, config.engine.spike_factor, config.engine.max_bad_steps,
    )  # fmt: skip
    held_out = HeldOut(corpus, list(weights_of(config)), config.validate.seq_len or config.train.seq_len, config.validate.rows)
    text = OmegaConf.to_yaml(OmegaConf.structured(config))
    job = Job(
        config, directory, engine, stream, token_loss, total_steps,
        validate=lambda: held_out.measure(engine, token_loss),
        throughput=Throughput(config.model, peak_flops(device_name(device), config.engine.dtype, config.run.peak_tflops)),
        metrics=Metrics(directory, config.run.wandb, config=OmegaConf.to_container(OmegaConf.create(text))),
    )  # fmt: skip
    resumed = resume(job)
    record_start(directory, step=engine.step, config=text)
    log.info("%s step %d of %d", "resumed at" if resumed else "starts at", engine.step, total_steps)
    stop = train(job, console)
    if stop.requested is not None:
        log.warning(stop.message(engine.step))
        record_end(directory, step=engine.step, status="stopped")
        return stop.exit_code
    finish(job, tokenizer, corpus, device)
    record_end(directory, step=engine.step, status="finished")
    write_stage_report(directory.path)
    return 0


def token_loss(model: torch.nn.Module, batch: PackedBatch) -> LossSum:
    """Next-token cross entropy, summed (nats)."""
    return LossSum(model(batch.ids, batch.cu_seqlens, batch.max_seqlen, batch.labels), batch.loss_tokens)


def weights_of(config: Config) -> dict[str, float]:
    """The stage's mixture without the sources that it leaves out."""
    return {source: weight for source, weight in config.data.weights[config.stage.name].items() if weight > 0}


def sources_of(config: Config) -> list[str]:
    return list(weights_of(config))


def steps_of(config: Config) -> int:
    """Optimizer steps of the stage."""
    if config.train.steps is not None:
        return config.train.steps
    assert config.train.tokens is not None
    return max(1, config.train.tokens // config.train.batch_tokens)


def show_data(stream: TokenStream, rows: int, directory: RunDirectory) -> None:
    """Say what each source and length bucket contributes, before anything is trained."""
    uses = stream.describe(rows)
    for use in uses:
        log.info(
            "data  %-28s %8s tokens  %5.1f%%  %6.2f epochs of %s documents",
            use.name, quantity(use.tokens), 100 * use.share, use.epochs, f"{use.documents:,}",
        )  # fmt: skip
    directory.write_json("data.json", [asdict(use) for use in uses])


def build_model(config: Config, device: torch.device, tokenizer: Tokenizer, corpus: Corpus, directory: RunDirectory) -> CausalLM:
    """Random or inherited weights, fp32 until the engine casts them."""
    dtype = DTYPES[config.engine.dtype]
    log.info(describe_backend(device, dtype, config.model.head_dim, config.engine.attention))
    source = handover.resolve(config)
    model = CausalLM.from_config(
        config.model, device=device, dtype=torch.float32, attention=config.engine.attention,
        recompute=config.engine.recompute, seed=config.seed if source is None else None,
    )  # fmt: skip
    counts = config.model.parameters()
    log.info("model %s: %s parameters, %s", config.model.name, f"{counts['total']:,}", "random" if source is None else f"from {source}")
    if source is not None:
        directory.write_json("handover.json", handover.as_rows(handover.load(model, source, config, tokenizer)))
        if config.validate.compare_with_init and not baseline_file(directory).exists():
            measure_baseline(source, config, device, corpus, directory)
    return model


def finish(job: Job, tokenizer: Tokenizer, corpus: Corpus, device: torch.device) -> None:
    """Loss by position, samples, the export, and the mark that the stage is complete."""
    config, run = job.config, job.run
    assert isinstance(job.engine.model, CausalLM)
    measured = measure_by_position(job.engine.model, config, corpus)
    if measured is not None:
        write_position_figure(measured, config, run)
    write_samples(job.engine.model, tokenizer, config, run, job.engine.step)
    if config.checkpoint.export:
        dtype = DTYPES[config.engine.dtype]
        export(run.export, config.model, job.engine.full_weights(), tokenizer_folder=run.path / "tokenizer", dtype=dtype)
        log.info("exported to %s", run.export)
    run.write_json("finished.json", {"step": job.engine.step, "tokens": job.tokens})


def measure_by_position(model: CausalLM, config: Config, corpus: Corpus) -> LossByPosition | None:
    """None where no held-out document is long enough to say anything."""
    seq_len = config.validate.seq_len or config.train.seq_len
    try:
        rows = long_validation_rows(corpus, seq_len, config.validate.rows, max(2, seq_len // 2), sources_of(config))
    except ConfigError as error:
        log.info("no loss by position: %s", error)
        return None
    return loss_by_position(model, rows, seq_len)


def baseline_file(directory: RunDirectory) -> Path:
    return directory.path / "position_of_init.json"


def measure_baseline(source: Path, config: Config, device: torch.device, corpus: Corpus, directory: RunDirectory) -> None:
    """The same figure for the weights that the stage starts from, with the RoPE base that they were trained with."""
    given, tensors, _ = read_weights(source)
    model = CausalLM.from_config(given, device=device, dtype=DTYPES[config.engine.dtype], attention=config.engine.attention, seed=None)
    handover.copy_weights(model, tensors, source)
    measured = measure_by_position(model, config, corpus)
    if measured is not None:
        directory.write_json(baseline_file(directory).name, {"label": given.name, "trained_to": given.max_position_embeddings, **asdict(measured)})


def write_position_figure(measured: LossByPosition, config: Config, directory: RunDirectory) -> None:
    """evaluation/by_position.json: this stage's curve and, where it was measured, that of the weights it started from."""
    curves = {f"after {config.stage.name}": measured}
    note = ""
    if baseline_file(directory).exists():
        saved: dict[str, Any] = json.loads(baseline_file(directory).read_text())
        before = LossByPosition(saved["width"], saved["loss"], saved["tokens"])
        curves[f"before {config.stage.name}"] = before
        beyond = saved["trained_to"]
        note = (
            f"mean loss at positions from {beyond:,} on: {before.mean(beyond):.3f} before {config.stage.name}, "
            f"{measured.mean(beyond):.3f} after"
        )
        log.info("%s", note)
    series = [
        {"label": label, "x": [(i + 0.5) * curve.width for i in range(len(curve.loss)) if curve.tokens[i]],
         "y": [loss for loss, tokens in zip(curve.loss, curve.tokens) if tokens]}
        for label, curve in curves.items()
    ]  # fmt: skip
    directory.write_json(
        "evaluation/by_position.json",
        {"title": "Loss by position on held-out documents", "x_label": "position (tokens)", "y_label": "loss (nats a token)",
         "series": series, "note": note},
    )  # fmt: skip


def write_samples(model: CausalLM, tokenizer: Tokenizer, config: Config, directory: RunDirectory, step: int) -> None:
    """Complete each prompt of run.samples (temperature 0.8, top-p 0.9), to the console and samples/."""
    if not config.run.samples:
        return
    prompts = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in config.run.samples]
    generators = [torch.Generator().manual_seed(config.seed + row) for row in range(len(prompts))]
    model.eval()
    answers = generate(
        model, prompts, max_new_tokens=config.run.sample_tokens, temperature=0.8, top_p=0.9,
        stop_ids=[tokenizer.eos_id], generators=generators,
    )  # fmt: skip
    texts = [prompt + tokenizer.decode(answer, skip_special=True) for prompt, answer in zip(config.run.samples, answers)]
    directory.samples.mkdir(exist_ok=True)
    (directory.samples / f"step_{step:08d}.txt").write_text("\n\n----\n\n".join(texts) + "\n", encoding="utf-8")
    for text in texts:
        log.info("sample\n%s", text)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
