"""The pairs that rounds leave for the reward models of later ones: against hacks, and from annotators."""

import logging
from pathlib import Path
from typing import Any

from internlm2.config.rounds import RoundsConfig
from internlm2.rlhf.annotation import Comparison, compare
from internlm2.rlhf.answers import Answer, read_answers, read_lines, write_lines
from internlm2.rlhf.audit import for_audit
from internlm2.stages.round_work import POLICIES, Stopped, Work

log = logging.getLogger(__name__)


def collect_pairs(root: Path, number: int, seed: int, config: RoundsConfig, work: Work) -> None:
    """Write down what round `number`'s models are trained on beside the base data: the fast path's pairs of all rounds
    before, and the slow path's of those whose labels have had `annotation.lag` rounds to come back.

    These are copies: a label that comes back later belongs to the next round, also when this one is resumed. Pairs
    about some questions are the audit model's; those against hacks are the reward model's, which is the one that has
    them. Raises Stopped.
    """
    for before in range(1, number):
        for path in ("fast", "slow"):
            targets = {model: _pair_file(root, number, model, before, path) for model in _models(config)}
            if all(target.exists() for target in targets.values()):
                continue
            if path == "fast":
                records = read_lines(root / f"round_{before}" / "fast.jsonl")
            elif before <= number - 1 - config.annotation.lag:
                records = _slow_path(root, before, seed, config, work)
            else:
                records = []
            share = config.audit.share if path == "slow" and config.audit.enabled else 0.0
            for model, target in targets.items():
                mine = [r for r in records if for_audit(_asked(r), share) == (model == "audit")]
                write_lines(target, map(work.shown, mine))


def pair_files(root: Path, number: int, config: RoundsConfig) -> dict[str, list[Path]]:
    """Model -> the files that `collect_pairs` wrote for it and that hold any pair."""
    places = [(before, path) for before in range(1, number) for path in ("fast", "slow")]
    files = {model: [_pair_file(root, number, model, *place) for place in places] for model in _models(config)}
    return {model: [file for file in some if read_lines(file)] for model, some in files.items()}


def _models(config: RoundsConfig) -> tuple[str, ...]:
    return ("reward", "audit") if config.audit.enabled else ("reward",)


def _pair_file(root: Path, number: int, model: str, before: int, path: str) -> Path:
    return root / f"round_{number}" / "preferences" / model / f"round_{before}_{path}.jsonl"


def ask(root: Path, number: int, answers: dict[str, list[Answer]], seed: int, config: RoundsConfig, work: Work) -> int:
    """Put the round's comparisons before people; others are asked when a round needs their labels. Returns how many."""
    folder = root / f"round_{number}"
    annotator = work.annotator(folder / "annotation")
    if annotator is None:
        return 0
    comparisons = _comparisons(answers, number, seed, config)
    if config.annotation.kind == "files":
        annotator(comparisons)
        log.info("%d comparisons to label: %s", len(comparisons), folder / "annotation")
    return len(comparisons)


def _slow_path(root: Path, before: int, seed: int, config: RoundsConfig, work: Work) -> list[dict[str, Any]]:
    """Pairs from the labels of an earlier round's comparisons. Raises Stopped where people's labels are awaited."""
    folder = root / f"round_{before}"
    annotator, target = work.annotator(folder / "annotation"), folder / "slow.jsonl"
    if annotator is None:
        return []
    by_people = config.annotation.kind == "files"
    if target.exists() and not by_people:
        return read_lines(target)
    answers = {policy: read_answers(folder / "answers" / f"{policy}.jsonl") for policy in POLICIES}
    comparisons = _comparisons(answers, before, seed, config)
    labels = annotator(comparisons)
    missing = sum(label is None for label in labels)
    if missing and by_people and config.annotation.when_missing == "stop":
        raise Stopped(
            0,
            f"{missing} of {len(labels)} comparisons in {folder / 'annotation' / 'requests.jsonl'} have no label yet: "
            "write labels.jsonl beside it and start again, or set rounds.annotation.when_missing=go_on.",
        )
    log.info("%d of %d comparisons of round %d are labelled", len(labels) - missing, len(labels), before)
    found = [pair.preference(label) for pair, label in zip(comparisons, labels) if label is not None]
    write_lines(target, [record for record in found if record is not None])
    return read_lines(target)


def _comparisons(answers: dict[str, list[Answer]], number: int, seed: int, config: RoundsConfig) -> list[Comparison]:
    everything = [answer for policy in POLICIES for answer in answers[policy]]
    return compare(everything, config.annotation.comparisons, seed, f"round-{number}")


def _asked(record: dict[str, Any]) -> str:
    return next((turn["content"] for turn in reversed(record["prompt"]) if turn["role"] == "user"), "")
