"""Was a test set trained on? The report's probe (5.4, Table 20): language-model loss on question and answer of the
training set, the test set, and a reference set of the same kind that no model can have seen.

    delta_1 = loss(test) - loss(reference)   clearly below 0: the test set leaked
    delta_2 = loss(test) - loss(train)       far above 0: the training set was trained on

Both come with bootstrap intervals over the items, so that "clearly" has a meaning: a set of a few hundred problems
moves either by some hundredths without any leak.
"""

from collections.abc import Sequence

import numpy as np

from internlm2.config import ConfigError
from internlm2.config.evaluate import ContaminationSuite
from internlm2.data.rows import Row
from internlm2.evaluate.held_out_suite import row_losses, text_row
from internlm2.evaluate.intervals import RESAMPLES
from internlm2.evaluate.item_files import fill, read_items
from internlm2.evaluate.results import Headline, Result
from internlm2.evaluate.subject import Subject


def run(subject: Subject, suite: ContaminationSuite, seed: int) -> list[Result]:
    """Losses of the sets and both differences."""
    if suite.test is None or suite.reference is None:
        raise ConfigError("suite.test and suite.reference are both needed; suite.train may be left out.")
    paths = {"train": suite.train, "test": suite.test, "reference": suite.reference}
    losses = {name: set_losses(subject, suite, f"suite.{name}", path) for name, path in paths.items() if path}
    rows: list[dict[str, object]] = [
        {"set": name, "problems": len(found), "loss": mean_of(found), "tokens": int(sum(t for _, t in found))}
        for name, found in losses.items()
    ]
    deltas = [difference("delta 1: test - reference", losses["test"], losses["reference"], seed)]
    if "train" in losses:
        deltas.append(difference("delta 2: test - train", losses["test"], losses["train"], seed))
    return [
        Result(
            name=suite.name,
            title="Contamination probe",
            rows=rows,
            headline=deltas,
            note=verdict(deltas),
            records=[
                {"set": name, "item": number, "loss": nats / tokens, "tokens": tokens}
                for name, found in losses.items()
                for number, (nats, tokens) in enumerate(found)
            ],
        )
    ]


def set_losses(subject: Subject, suite: ContaminationSuite, key: str, path: str) -> list[tuple[float, int]]:
    """(nats, tokens) of each item."""
    items = read_items(key, path, (suite.question, suite.answer), suite.limit)
    rows: list[Row] = []
    for item in items:
        named = {"question": item[suite.question], "answer": item[suite.answer]}
        rows.append(text_row(fill(suite.template, named, "suite.template"), subject.tokenizer, subject.trained_to))
    found = row_losses(subject.model, rows, subject.batch_tokens)
    return [(float(losses.sum()), int((row.labels >= 0).sum())) for row, losses in zip(rows, found, strict=True)]


def mean_of(found: Sequence[tuple[float, int]]) -> float:
    """Mean loss over the tokens of a set."""
    return sum(nats for nats, _ in found) / sum(tokens for _, tokens in found)


def difference(name: str, left: Sequence[tuple[float, int]], right: Sequence[tuple[float, int]], seed: int) -> Headline:
    """Difference of two sets' mean losses, with a 95% interval over resampled items of both."""
    draw = np.random.Generator(np.random.PCG64(seed))
    first, second = np.asarray(left), np.asarray(right)
    values = np.empty(RESAMPLES)
    for number in range(RESAMPLES):
        a = first[draw.integers(0, len(first), len(first))].sum(0)
        b = second[draw.integers(0, len(second), len(second))].sum(0)
        values[number] = a[0] / a[1] - b[0] / b[1]
    low, high = np.quantile(values, [0.025, 0.975])
    return Headline(name, mean_of(left) - mean_of(right), (float(low), float(high)), better="near 0")


def leaked(delta_1: Headline) -> bool:
    """Is the test set easier than the reference beyond what chance explains?"""
    assert delta_1.interval is not None
    return delta_1.interval[1] < 0


def verdict(deltas: Sequence[Headline]) -> str:
    """What the differences say, in words."""
    said = ["The test set is easier than the reference, beyond chance: it was probably trained on."]
    if not leaked(deltas[0]):
        said = ["No sign that the test set was trained on."]
    if len(deltas) > 1 and deltas[1].interval is not None and deltas[1].interval[0] > 0:
        said.append("The training set is easier than the test set, beyond chance: it was trained on.")
    return " ".join(said)
