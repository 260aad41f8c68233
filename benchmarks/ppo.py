"""Seconds of one PPO iteration, by phase, against TRL 1.12's PPOTrainer, the last version that has one.

    pip install --no-deps --target /tmp/trl112 trl==1.12.0
    python benchmarks/ppo.py --trl-path /tmp/trl112 [--model tiny] [--answers 16] [--rounds 3] [--clock cpu]

Both sides train the same shape from random weights: an actor and a critic, with a frozen reference and a frozen reward
model, one optimizer step over `--answers` prompts of `--prompt-tokens`, each answered with exactly `--answer-tokens`
(no stop token), fp32, temperature 1, GAE, no pretraining loss. TRL's `bf16=True` has no effect on a CPU with
transformers 5, hence fp32; `--dtype bf16` is for ours alone. `--ragged` draws the answers' lengths between an eighth
and all of `--answer-tokens`; TRL gets its end of sequence planted there, and pads up to the longest as it always does.
Rounds alternate between the two in one process.

Phases: `rollout` draws the answers; `score` is everything up to the advantages (log-probabilities, values, rewards);
`train` is forward, backward and optimizer of actor and critic. `--clock cpu` counts processor seconds: on a busy
machine, with --threads 1, only the ratio means something. State memory is what stays between two iterations: weights,
masters and moments. The sampler's packed copy of the actor lives while it draws; TRL samples from the actor itself.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from torch import Tensor

from internlm2.config import Config, ModelConfig
from internlm2.config.compose import CONF, register_schema, to_config
from internlm2.data.prompts import Prompt, PromptStream
from internlm2.engine.single import DTYPES, SingleEngine
from internlm2.generation.build import build_generator
from internlm2.model.scalar import ScalarModel
from internlm2.model.transformer import CausalLM
from internlm2.rlhf.frozen import ReferencePolicy, freeze
from internlm2.rlhf.kl import KLController
from internlm2.rlhf.rollout import Question, Rollout, Sample
from internlm2.stages.ppo_iteration import Clock, Trainer, make_experience, update
from internlm2.stages.ppo_models import Models, sampling_weights
from internlm2.text.chat import Message
from internlm2.text.tokenizer import Tokenizer

INSTALL = "pip install --no-deps --target /tmp/trl112 trl==1.12.0, then --trl-path /tmp/trl112"
PHASES = ("rollout", "score", "train")
Seconds = dict[str, float]
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass
class Work:
    """What both sides do."""

    model: ModelConfig
    prompts: list[list[int]]
    lengths: list[int]  # of the answers
    ragged: bool
    clock: Callable[[], float]


def compose_config(options: argparse.Namespace) -> Config:
    register_schema()
    overrides = [
        "stage=ppo", f"model={options.model}", "data=stdlib", "init_from=/none", f"engine.dtype={options.dtype}",
        "engine.device=cpu", "ppo.critic.init=policy", "ppo.reward.kind=rule", "ppo.reward.rule=final_number",
        "ppo.critic_warmup=0", "ppo.pretrain.coefficient=0", "ppo.rollout.top_p=1", "ppo.kl.exact_rows=0",
        f"ppo.prompts_per_iteration={options.answers}", f"ppo.rollout.max_prompt_tokens={options.prompt_tokens}",
        f"ppo.rollout.max_new_tokens={options.answer_tokens}", f"ppo.old_logprobs={options.old_logprobs}",
        f"generation.max_rows={options.answers}",
    ]  # fmt: skip
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return to_config(compose("train", overrides=overrides))


def ours(work: Work, config: Config) -> tuple[Callable[[], Seconds], float]:
    """(a function that runs one iteration and returns its seconds, bytes of state)."""
    assert config.ppo is not None
    dtype, engine = DTYPES[config.engine.dtype], config.engine
    guard = (engine.on_nonfinite, engine.spike_factor, engine.max_bad_steps)
    actor = SingleEngine(CausalLM.from_config(work.model, seed=0), config.optim, 10_000, "cpu", engine.dtype, *guard)
    critic = SingleEngine(
        ScalarModel.from_config(work.model, seed=1), config.ppo.critic.optim, 10_000, "cpu", engine.dtype, *guard
    )
    reference = cast(CausalLM, freeze(CausalLM.from_config(work.model, seed=0, dtype=dtype)))
    judge = cast(ScalarModel, freeze(ScalarModel.from_config(work.model, seed=2, dtype=dtype)))
    plain = cast(CausalLM, actor.model)
    models = Models(
        actor, critic, ReferencePolicy(reference, shared=False), scorer(judge),
        build_generator(plain, config.generation, work.model.vocab_size), plain,
    )  # fmt: skip
    never = SimpleNamespace(eos_id=work.model.vocab_size, special_id=lambda name: work.model.vocab_size)
    trainer = Trainer(
        config, models, cast(Tokenizer, never), cast(PromptStream, None), None, KLController(config.ppo.kl.coefficient)
    )
    asked = Prompt((Message("user", ""),), "")
    questions = [
        Question(number, replace(asked, reference={"ids": ids}), ids) for number, ids in enumerate(work.prompts)
    ]

    def measure() -> Seconds:
        clock = Clock(work.clock)
        with clock("rollout"), sampling_weights(models, config) as sampler:
            params = trainer.sampling("rollout", trainer.progress.iteration, 1)
            drawn = sampler.generate(work.prompts, cast(Any, [replace(params, max_new_tokens=n) for n in work.lengths]))
        rollouts = [
            Rollout(questions[a.prompt], a.sample, a.tokens, a.logprobs, a.sampling_logprobs, "length") for a in drawn
        ]
        with clock("score"):
            experience, _, _ = make_experience(trainer, rollouts)
        with clock("train"):
            update(trainer, experience, 0.0)
        trainer.progress.iteration += 1
        return clock.seconds

    trained = sum(fragment.view.nbytes for e in (actor, critic) for fragment in e.fragments())
    copies = sum(p.nbytes for e in (actor, critic) for p in e.model.parameters() if p.dtype != torch.float32)
    frozen = sum(p.nbytes for m in (reference, judge) for p in m.parameters())
    return measure, float(trained + copies + frozen)


def scorer(judge: ScalarModel) -> Callable[[Any], list[float]]:
    """The reward model over prompt and answer, in one packed pass."""

    def score(samples: list[Sample]) -> list[float]:
        rows = [sample.prompt.reference["ids"] + sample.tokens for sample in samples]
        bounds = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0).to(torch.int32)
        ids = torch.tensor([token for row in rows for token in row])
        with torch.no_grad():
            return cast(list[float], judge.scores(ids, bounds, max(len(row) for row in rows)).tolist())

    return score


def rival(work: Work, steps: int) -> tuple[Callable[[], list[Seconds]], float]:
    """TRL: (a function that runs `steps` iterations after one that warms up, bytes of state)."""
    import datasets
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
    from transformers import logging as transformers_logging
    from trl.experimental.ppo import PPOConfig, PPOTrainer
    from trl.experimental.ppo import ppo_trainer as module

    transformers_logging.set_verbosity_error()
    datasets.disable_progress_bars()
    model, count = work.model, len(work.prompts)
    shape = dict(
        vocab_size=model.vocab_size, hidden_size=model.hidden_size, num_hidden_layers=model.layers,
        num_attention_heads=model.heads, num_key_value_heads=model.kv_heads, head_dim=model.head_dim,
        intermediate_size=model.intermediate_size, rms_norm_eps=model.norm_eps, attn_implementation="sdpa",
        tie_word_embeddings=model.tie_embeddings, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config = LlamaConfig(**shape)
    policy, reference = (LlamaForCausalLM(config).float() for _ in range(2))
    scalar = LlamaConfig(**shape, num_labels=1)
    judge, critic = (LlamaForSequenceClassification(scalar).float() for _ in range(2))
    data = datasets.Dataset.from_dict({"input_ids": work.prompts * (steps + 1)})

    def measure() -> list[Seconds]:
        with tempfile.TemporaryDirectory() as folder:
            settings = PPOConfig(
                folder, per_device_train_batch_size=count, gradient_accumulation_steps=1, num_mini_batches=1,
                num_ppo_epochs=1, total_episodes=count * (steps + 1), response_length=max(work.lengths),
                local_rollout_forward_batch_size=count, learning_rate=1e-6,
                stop_token="eos" if work.ragged else None, temperature=1.0, lr_scheduler_type="constant",
                logging_strategy="no", save_strategy="no", report_to=[], use_cpu=True,
                bf16=False, fp16=False, gradient_checkpointing=False, num_sample_generations=0, disable_tqdm=True,
            )  # fmt: skip
            trainer = PPOTrainer(
                args=settings, processing_class=outside_pad(model.vocab_size), model=policy, ref_model=reference,
                reward_model=judge, value_model=critic, train_dataset=data,
            )  # fmt: skip
            return timed(trainer, module, work)[1:]

    sizes = [sum(p.nbytes for p in network.parameters()) for network in (policy, critic, reference, judge)]
    return measure, float(3 * (sizes[0] + sizes[1]) + sizes[2] + sizes[3])


def outside_pad(vocab_size: int) -> Any:
    """A tokenizer object, which TRL wants; its pad id lies outside the vocabulary, so that no answer is cut at it."""
    from tokenizers import Tokenizer as FastTokenizer
    from tokenizers import models
    from transformers import PreTrainedTokenizerFast

    words = {"<s>": 1, "</s>": 2, "<pad>": vocab_size}
    fast = FastTokenizer(models.WordLevel(words, unk_token="<s>"))
    return PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="<pad>", eos_token="</s>", bos_token="<s>")


def timed(trainer: Any, module: Any, work: Work) -> list[Seconds]:
    """Run TRL's loop with marks around generation and at the first forward pass with gradients."""
    rows: list[Seconds] = []
    marks: dict[str, float] = {}
    clock = work.clock
    generation, forward = module.batch_generation, module.forward

    def generate(*arguments: Any, **named: Any) -> Any:
        marks.clear()
        marks["start"] = clock()
        sequences, logits = generation(*arguments, **named)
        if work.ragged:
            for row, length in enumerate(work.lengths):
                sequences[row, len(work.prompts[row]) + length - 1] = 2
        marks["drawn"] = clock()
        return sequences, logits

    def run(*arguments: Any, **named: Any) -> Tensor:
        if torch.is_grad_enabled() and "train" not in marks:
            marks["train"] = clock()
        return forward(*arguments, **named)

    def finish(*arguments: Any, **named: Any) -> None:
        end = clock()
        rows.append(
            {
                "rollout": marks["drawn"] - marks["start"],
                "score": marks["train"] - marks["drawn"],
                "train": end - marks["train"],
            }
        )

    module.batch_generation, module.forward, trainer.log = generate, run, finish
    try:
        with open(os.devnull, "w") as silence:
            out, sys.stdout = sys.stdout, silence
            try:
                trainer.train()
            finally:
                sys.stdout = out
    finally:
        module.batch_generation, module.forward = generation, forward
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-path")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--answers", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--answer-tokens", type=int, default=64)
    parser.add_argument("--ragged", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--old-logprobs", choices=("recomputed", "sampler"), default="recomputed")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--json", dest="json_file")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    torch.set_num_threads(options.threads)
    if options.trl_path:
        sys.path.insert(0, options.trl_path)
    config = compose_config(options)
    draw = np.random.default_rng(0)
    size = (options.answers, options.prompt_tokens)
    prompts = draw.integers(3, config.model.vocab_size, size).tolist()
    lengths = [options.answer_tokens] * options.answers
    if options.ragged:
        lengths[1:] = draw.integers(
            max(1, options.answer_tokens // 8), options.answer_tokens, options.answers - 1
        ).tolist()
    work = Work(config.model, prompts, lengths, options.ragged, CLOCKS[options.clock])
    mine, state = ours(work, config)
    mine()  # warms up
    try:
        theirs, their_state = rival(work, options.steps)
    except ImportError as error:
        print(f"TRL with PPO is not installed and left out ({error}): {INSTALL}")
        found = {"ours": [mine() for _ in range(options.rounds)]}
        their_state = 0.0
    else:
        found = {"ours": [], "TRL 1.12": []}
        for _ in range(options.rounds):
            found["ours"] += [mine() for _ in range(options.steps)]
            found["TRL 1.12"] += theirs()
    report(found, state, their_state, options)


def report(found: dict[str, list[Seconds]], state: float, their_state: float, options: argparse.Namespace) -> None:
    """Medians by phase and, if asked, the records."""
    median = {
        name: {phase: statistics.median(row[phase] for row in rows) for phase in PHASES} for name, rows in found.items()
    }
    for phases in median.values():
        phases["whole iteration"] = sum(phases[phase] for phase in PHASES)
    names = list(median)
    print(f"{'seconds':18}" + "".join(f"{name:>12}" for name in names) + f"{'faster by':>12}")
    records = []
    for phase in (*PHASES, "whole iteration"):
        values = [median[name][phase] for name in names]
        ratio = values[1] / values[0] if len(values) > 1 else float("nan")
        print(f"{phase:18}" + "".join(f"{value:12.3f}" for value in values) + f"{ratio:11.2f}x")
        if len(values) > 1:
            records.append(_record(f"PPO, {phase}", values[0], values[1], f"{options.clock} seconds", ratio, options))
    if their_state:
        ratio = their_state / state
        print(f"{'state, MB':18}{state / 1e6:12.1f}{their_state / 1e6:12.1f}{ratio:11.2f}x smaller")
        records.append(_record("PPO, state between iterations", state / 1e6, their_state / 1e6, "MB", ratio, options))
    if options.json_file:
        Path(options.json_file).write_text(json.dumps(records, indent=1), encoding="utf-8")


def _record(
    work: str, mine: float, theirs: float, unit: str, ratio: float, options: argparse.Namespace
) -> dict[str, Any]:
    lengths = f"{options.prompt_tokens} + {options.answer_tokens} tokens{', ragged' if options.ragged else ''}"
    shape = f"{options.model}, {options.answers} answers, {lengths}"
    return {
        "work": f"{work} ({shape})", "rival": "TRL 1.12 PPOTrainer", "ours": mine, "theirs": theirs, "unit": unit,
        "ratio": ratio, "threads": options.threads, "setting": f"ours {options.dtype}, TRL fp32, CPU",
    }  # fmt: skip


if __name__ == "__main__":
    main()
