"""Do many ranks train as one process does? The loss curves of every stage, over engines and numbers of ranks.

    python benchmarks/agreement.py [--stages pretrain_4k sft rm ppo] [--engines zero1 zero2 zero3] [--ranks 1 2 4]
                                   [--sequence-parallel 2] [--steps 30] [--json FILE]

A very small model in fp32 on the toy language, forked ranks joined by gloo. Printed is the largest difference of a loss
from that of engine=single over all steps, in nats; it may be the round-off of splitting a batch, 3e-5. PPO draws
answers, and a probability that differs in its last digit may turn a draw into another word: `answers` counts those that
differ, and the line `same answers` gives every run those of the single process, so that arithmetic alone is left.
"""

import argparse
import contextlib
import importlib
import json
import os
import pickle
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from hydra import compose, initialize_config_dir
from rich.console import Console
from scale import on_ranks

from internlm2.config import Config
from internlm2.config.compose import CONF, register_schema, to_config
from internlm2.model.export import export_weights
from internlm2.model.transformer import CausalLM
from internlm2.model.weights import model_weights
from internlm2.rlhf.rollout import Rollout
from internlm2.run.directory import RunDirectory
from internlm2.run.metrics import read_records
from internlm2.run.ranks import from_environment
from internlm2.sources.toy_tokenizer import write_tokenizer
from internlm2.stages import ppo_iteration, recipe
from internlm2.stages.ppo_round import run_round

ANSWERS = "answers.pickle"
LIMIT = 3e-5  # the round-off of splitting a batch in another way
SHARED = [
    "data=toy_language",
    "model=micro",
    "model.hidden_size=32",
    "model.layers=2",
    "model.heads=2",
    "model.kv_heads=2",
    "model.head_dim=16",
    "model.intermediate_size=48",
    "model.max_position_embeddings=128",
    "model.vocab_size=300",
    "engine.dtype=fp32",
    "engine.device=cpu",
    "engine.threads=1",
    "train.seq_len=64",
    "train.micro_batch=1",
    "train.batch_tokens=512",
    "optim.lr=1e-3",
    "checkpoint.every=null",
    "checkpoint.export=false",
    "run.samples=[]",
    "generation.max_rows=16",
    "validate.every=null",
    "data.validation_fraction=0.002",
    "data.workers=1",
]
STAGES = {
    "pretrain_4k": ["init_from=null", "data.tokenizer.kind=toy", "data.packing=best_fit"],
    "sft": [],
    "rm": ["checkpoint.export=true"],
    # Uneven answers, minibatches of them, and rows of the pretraining loss that some ranks have none of.
    "ppo": [
        "prompts=toy_language",
        "ppo.critic.optim.lr=1e-3",
        "ppo.critic_warmup=2",
        "ppo.prompts_per_iteration=12",
        "ppo.rollout.max_prompt_tokens=32",
        "ppo.rollout.max_new_tokens=10",
        "ppo.micro_batch_tokens=128",
        "ppo.validation.every=null",
        "ppo.validation.rows=4",
    ],
}
LOSSES = {"ppo": ("loss", "value_loss")}  # what else than `loss` is a loss curve
Answers = list[dict[tuple[int, int], Rollout]]  # by iteration, by the prompt's position and the number of the sample


def composed(*overrides: str) -> Config:
    register_schema()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return to_config(compose("train", overrides=list(overrides)))


def train(overrides: Sequence[str], replayed: Path | None) -> list[dict[str, Any]]:
    """A stage on this rank, in the folder that the overrides name; its records. PPO's answers are left in that folder,
    or come from the file `replayed`.
    """
    config, drawn = composed(*overrides), list[dict[tuple[int, int], Rollout]]()
    folder = Path(config.root) / config.name / config.stage.name
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        if config.ppo is None:
            recipe.run_stages([config])
        else:
            directory = RunDirectory(folder, writes=from_environment().is_first)
            with answers_kept(drawn, replayed):
                policy, reward = Path(config.init_from or ""), Path(str(config.ppo.reward.model))
                run_round(config, directory, Console(file=nowhere), policy=policy, reward=reward)
            everyone: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, drawn)
            if directory.writes:
                answers: Answers = [dict(pair for part in parts for pair in part.items()) for parts in zip(*everyone)]
                (folder / ANSWERS).write_bytes(pickle.dumps(answers))
    return read_records(folder / "metrics.jsonl")


@contextlib.contextmanager
def answers_kept(drawn: Answers, replayed: Path | None) -> Iterator[None]:
    """Every iteration's answers go to `drawn`; with `replayed`, a file of them, they come from there."""
    collect = ppo_iteration.collect
    given: Answers | None = None if replayed is None else pickle.loads(replayed.read_bytes())

    def kept(*arguments: Any) -> list[Rollout]:
        rollouts = collect(*arguments)
        if given is not None:
            rollouts = [given[len(drawn)][key] for key in map(name_of, rollouts)]
        drawn.append({name_of(rollout): rollout for rollout in rollouts})
        return rollouts

    ppo_iteration.collect = kept
    try:
        yield
    finally:
        ppo_iteration.collect = collect


def name_of(rollout: Rollout) -> tuple[int, int]:
    return rollout.question.position, rollout.sample


class Runs:
    """Runs of the stages below `root`, each started from the same weights and data."""

    def __init__(self, root: Path, steps: int) -> None:
        self.root, self.steps = root, steps
        write_tokenizer(root / "tokenizer")
        config = composed("stage=pretrain_4k", *SHARED, *STAGES["pretrain_4k"], "model.initializer_range=0.25")
        weights = model_weights(CausalLM.from_config(config.model, seed=3))
        self.policy = export_weights(weights, root / "policy", tokenizer=root / "tokenizer").folder

    def run(self, stage: str, engine: str, ranks: int, sequence: int = 1, replayed: Path | None = None) -> "Run":
        """Train, and read what was left."""
        name = f"{engine}_{ranks}_{sequence}" + ("_replayed" if replayed else "")
        overrides = [f"stage={stage}", *SHARED, *STAGES[stage], f"root={self.root}", f"name={name}", f"engine={engine}"]
        overrides += [f"engine.sequence_parallel={sequence}", f"train.steps={self.steps}"]
        if stage != "pretrain_4k":
            overrides += [f"init_from={self.policy}"]
        if stage == "ppo":
            reward = self.root / "single_1_1" / "rm" / "export"
            overrides += [f"ppo.iterations={self.steps}", f"ppo.reward.model={reward}"]
        records = on_ranks(train, ranks, overrides, replayed)
        return Run(records, self.root / name / stage / ANSWERS)


@dataclass(frozen=True)
class Run:
    """Records of a run, and the file of PPO's answers."""

    records: list[dict[str, Any]]
    answers: Path

    def curve(self, key: str) -> list[float]:
        return [record[key] for record in self.records if record.get(key) is not None]

    def other_answers(self, other: "Run") -> int:
        """How many answers have other tokens than that run's."""
        ours, theirs = (pickle.loads(run.answers.read_bytes()) for run in (self, other))
        pairs = [(mine[key], one[key]) for mine, one in zip(ours, theirs, strict=True) for key in one]
        return sum(mine.tokens != one.tokens for mine, one in pairs)


def furthest(ours: Run, theirs: Run, key: str) -> float:
    """The largest difference of two curves."""
    pairs = zip(ours.curve(key), theirs.curve(key), strict=True)
    return max(abs(one - other) for one, other in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=STAGES)
    parser.add_argument("--engines", nargs="+", default=["zero1", "zero2", "zero3"])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--sequence-parallel", type=int, default=2)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--json", dest="json_file", type=Path)
    given = parser.parse_args()
    load_deepspeed()
    records, runs = list[dict[str, Any]](), Runs(Path(tempfile.mkdtemp(prefix="agreement-")), given.steps)
    if "ppo" in given.stages and "rm" not in given.stages:
        runs.run("rm", "single", 1)
    for stage in given.stages:
        single = runs.run(stage, "single", 1)
        for engine, ranks, sequence in layouts(given.engines, given.ranks, given.sequence_parallel):
            found = [(runs.run(stage, engine, ranks, sequence), "")]
            if stage == "ppo":
                found.append((runs.run(stage, engine, ranks, sequence, single.answers), "same answers"))
            for run, note in found:
                row = {"stage": stage, "engine": engine, "ranks": ranks, "sequence_parallel": sequence, "note": note}
                for key in LOSSES.get(stage, ("loss",)):
                    row |= {key: furthest(run, single, key), f"{key}_steps": len(single.curve(key))}
                if stage == "ppo":
                    row["answers"] = run.other_answers(single)
                records.append(row)
                print(
                    "  ".join(
                        f"{key} {value:.1e}" if isinstance(value, float) else f"{key} {value}"
                        for key, value in row.items()
                        if value != ""
                    ),
                    flush=True,
                )
    worst = max(row[key] for row in records for key in ("loss", "value_loss") if key in row)
    print(f"largest difference {worst:.1e} nats; the round-off of splitting a batch is {LIMIT:g}")
    if given.json_file is not None:
        given.json_file.write_text(json.dumps(records, indent=1) + "\n")


def layouts(engines: Sequence[str], ranks: Sequence[int], sequence: int) -> list[tuple[str, int, int]]:
    """(engine, ranks, ranks to a row): every engine at every number of ranks, then with shared rows."""
    plain = [(engine, count, 1) for engine in engines for count in ranks]
    return plain + ([(engine, sequence, sequence) for engine in engines] if sequence > 1 else [])


def load_deepspeed() -> None:
    """Once, before the forks: what every rank would otherwise import by itself."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    for module in ("deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer", "torch._dynamo"):
        importlib.import_module(module)


if __name__ == "__main__":
    main()
