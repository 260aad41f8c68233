"""What conditions are worth where preferences contradict each other (after the report's ablation of system prompts).

python train.py stage=rm experiment=conflict

For each seed one start and two reward models, one of which is told the domain. A reader that cannot see the domain has
one verdict for a pair of answers, whatever the domain: on the held-out pairs, each judged in all its domains, the best
such verdicts bound what the unconditional model can reach.
"""

import concurrent.futures
import contextlib
import json
import logging
import multiprocessing
import os
import signal
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from types import FrameType
from typing import Any

from rich.console import Console

from internlm2.config import Config
from internlm2.model.export import REWARD_SETTINGS
from internlm2.rlhf.reward_metrics import student_interval
from internlm2.run.console import logging_to
from internlm2.run.directory import RunDirectory
from internlm2.stages import reward
from internlm2.stages.preparation import is_complete

log = logging.getLogger(__name__)

ARMS = ("conditional", "unconditional")


@dataclass(frozen=True)
class Arm:
    """One of the models of a seed."""

    name: str
    seed: int
    config: Config
    path: Path


def run(config: Config, directory: RunDirectory, console: Console) -> int:
    """Train what is not there yet, print the table, write results.json and the figure. Returns the exit code."""
    settings = config.conflict
    assert settings is not None  # conf/experiment/conflict.yaml
    arms = list(_arms(config, directory.path))
    waiting = [arm for arm in arms if not is_complete(RunDirectory(arm.path), arm.config)]
    log.info("%d of %d models to train, %d at a time", len(waiting), len(arms), settings.processes)
    for code in _train(waiting, settings.processes):
        if code:
            return code
    results = [(arm, json.loads((arm.path / REWARD_SETTINGS).read_text(encoding="utf-8"))) for arm in arms]
    table = tabulate(results)
    log.info("accuracy on held-out pairs, mean over %d seeds with its 95%% interval\n%s", len(settings.seeds), table)
    directory.write_json("results.json", [{"arm": arm.name, "seed": arm.seed, **content} for arm, content in results])
    directory.write_json("finished.json", {"step": config.train.total_steps, "epochs": None})
    return 0


def _arms(config: Config, root: Path) -> Iterator[Arm]:
    assert config.conflict is not None
    for seed in config.conflict.seeds:
        for name in ARMS:
            made = deepcopy(config)
            assert made.reward is not None
            made.seed, made.reward.conditional, made.stage.kind = seed, name == "conditional", "reward"
            yield Arm(name, seed, made, root / f"seed_{seed}_{name}")


def _train(arms: list[Arm], processes: int) -> Iterator[int]:
    """Exit codes of the runs, as they end."""
    if len(arms) <= 1 or processes == 1:
        yield from map(_train_one, arms)
        return
    running: set[concurrent.futures.Future[int]] = set()
    # A fresh interpreter, not a fork: the parent may hold threads of torch.
    pool = concurrent.futures.ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"))
    with pool, _passing_on(signal.SIGTERM) as received:
        try:
            for arm in arms:  # no more than can run, so that after a signal none begins
                if len(running) == processes:
                    done, running = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
                    yield from (future.result() for future in done)
                running.add(pool.submit(_train_one, arm))
            yield from (future.result() for future in concurrent.futures.as_completed(running))
        except BrokenProcessPool:
            if not received:
                raise
            yield 128 + received[0]  # a run that was not training yet has nothing to save


@contextlib.contextmanager
def _passing_on(number: signal.Signals) -> Iterator[list[int]]:
    """The signal stops the runs, which save and end, rather than leaving them behind; yields what came so far."""
    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for child in multiprocessing.active_children():
            if child.pid is not None:
                os.kill(child.pid, number)

    before = signal.signal(number, handle)
    try:
        yield received
    finally:
        signal.signal(number, before)


def _train_one(arm: Arm) -> int:
    directory = RunDirectory(arm.path)
    with directory.lock(), logging_to(directory.log) as console:
        log.info("seed %d, %s", arm.seed, arm.name)
        return reward.run(arm.config, directory, console)


def tabulate(results: list[tuple[Arm, dict[str, Any]]]) -> str:
    """A line for each arm, for the conditional one told a wrong domain, and for the best reader without a domain."""
    domains = list(results[0][1]["domains"])
    rows = {f"{name} model": _columns(results, name, domains) for name in ARMS}
    told = [content for arm, content in results if arm.name == "conditional"]
    rows["told another domain"] = [[_wrong(content, domain) for content in told] for domain in domains]
    rows["told another domain"].append([mean(values) for values in zip(*rows["told another domain"])])
    lines = [["", *domains, "all pairs"]]
    lines += [[name, *(_cell(values) for values in columns)] for name, columns in rows.items()]
    bound = results[0][1]["blind_bound"]
    lines.append(["best without the domain", *(f"{bound[domain]:.1%}" for domain in domains), f"{bound['all']:.1%}"])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths)) for line in lines)


def _columns(results: list[tuple[Arm, dict[str, Any]]], name: str, domains: list[str]) -> list[list[float]]:
    """Accuracies over the seeds: by domain, and over all pairs."""
    own = [content["domains"] for arm, content in results if arm.name == name]
    columns = [[found[domain]["accuracy"] for found in own] for domain in domains]
    pairs = [own[0][domain]["pairs"] for domain in domains]
    together = [sum(a * n for a, n in zip(values, pairs)) / sum(pairs) for values in zip(*columns)]
    return [*columns, together]


def _wrong(content: dict[str, Any], domain: str) -> float:
    return mean(value for told, value in content["swap"][domain].items() if told != domain)


def _cell(values: list[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.1%}"
    return f"{mean(values):.1%} +- {student_interval(stdev(values), len(values)):.1%}"
