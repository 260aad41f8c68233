"""Fit the coefficients on published runs, and judge them on rows that the fit has not seen.

The most probable coefficients under their priors (each guess known within its doubt) and errors with heavy tails
(Student's t): a run that some circumstance outside the table slowed down pulls little. Levenberg-Marquardt in the
logarithms; a few seconds.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from internlm2.plan.coefficients import DOUBTS, NAMES, Coefficients
from internlm2.plan.published import Errors, PublishedRun, errors, families

SPREAD = 0.025  # spread of a published figure around a right model: repeated rows of one setting differ by about this
FREEDOM = 4.0  # degrees of freedom of Student's t


def fit(runs: Sequence[PublishedRun], iterations: int = 60) -> Coefficients:
    """Coefficients for `runs`. Deterministic."""
    centre = np.log([getattr(Coefficients(), name) for name in NAMES])
    doubts = np.array([DOUBTS[name] for name in NAMES])
    point, damping = centre.copy(), 1e-2
    cost = _cost(runs, point, centre, doubts)
    for _ in range(iterations):
        residuals = _residuals(runs, point)
        slopes = np.stack(
            [(_residuals(runs, point + step) - residuals) / 1e-4 for step in 1e-4 * np.eye(len(point))], 1
        )
        weights = (FREEDOM + 1) / (FREEDOM + (residuals / SPREAD) ** 2) / SPREAD**2
        curvature = (slopes.T * weights) @ slopes + np.diag(1 / doubts**2)
        downhill = -(slopes.T * weights) @ residuals - (point - centre) / doubts**2
        better = None
        while better is None and damping < 1e8:
            trial = point + np.linalg.solve(curvature + damping * np.diag(np.diag(curvature)), downhill)
            if (found := _cost(runs, trial, centre, doubts)) < cost:
                better = cost - found
                point, cost, damping = trial, found, max(damping / 5, 1e-6)
            else:
                damping *= 4
        if better is None or better < 1e-6:
            break
    return _coefficients(point)


def _coefficients(point: np.ndarray) -> Coefficients:
    return Coefficients(**{name: math.exp(value) for name, value in zip(NAMES, point.tolist())})


def _residuals(runs: Sequence[PublishedRun], point: np.ndarray) -> np.ndarray:
    coefficients = _coefficients(point)
    return np.array([run.error(coefficients) for run in runs])


def _cost(runs: Sequence[PublishedRun], point: np.ndarray, centre: np.ndarray, doubts: np.ndarray) -> float:
    """Minus the logarithm of the posterior."""
    surprise = np.log1p((_residuals(runs, point) / SPREAD) ** 2 / FREEDOM).sum() * (FREEDOM + 1) / 2
    return float(surprise + 0.5 * (((point - centre) / doubts) ** 2).sum())


def halves(runs: Sequence[PublishedRun], seeds: Sequence[int]) -> list[Errors]:
    """For each seed: fit on a random half of the rows, errors on the other."""
    judged = []
    for seed in seeds:
        order = list(runs)
        random.Random(seed).shuffle(order)
        judged.append(errors(order[1::2], fit(order[::2])))
    return judged


def left_out(runs: Sequence[PublishedRun], chosen: Callable[[PublishedRun], bool]) -> Errors:
    """Errors on the rows that `chosen` picks, fitted on all others."""
    return errors([run for run in runs if chosen(run)], fit([run for run in runs if not chosen(run)]))


def calibrated(runs: Sequence[PublishedRun], chosen: Callable[[PublishedRun], bool]) -> Errors:
    """As `left_out`, but each picked row in turn calibrates the time of the others, as one measured run would."""
    coefficients = fit([run for run in runs if not chosen(run)])
    logs = [run.error(coefficients) for run in runs if chosen(run)]
    sizes = sorted(abs(math.expm1(a - b)) for i, a in enumerate(logs) for j, b in enumerate(logs) if i != j)
    middle, high = sizes[len(sizes) // 2], sizes[int(0.9 * len(sizes))]
    return Errors(len(logs), middle, high, sizes[-1], 0.0)


def judge(runs: Sequence[PublishedRun], seeds: Sequence[int]) -> dict[str, Any]:
    """The record for coefficients.json: the error bands that every plan prints."""
    split = halves(runs, seeds)
    record: dict[str, Any] = {
        "held_out_halves": {
            "splits": len(split),
            "median": float(np.mean([one.median for one in split])),
            "p90": float(np.mean([one.p90 for one in split])),
            "worst_median": max(one.median for one in split),
            "worst_p90": max(one.p90 for one in split),
        }
    }
    whole = {name: (lambda run, name=name: run.family == name) for name in families(runs)}
    record["left_out"] = {name: asdict(left_out(runs, chosen)) for name, chosen in whole.items()}
    record["calibrated"] = {name: asdict(calibrated(runs, chosen)) for name, chosen in whole.items()}
    record["left_out"]["128 GPUs and more"] = asdict(left_out(runs, lambda run: run.layout.gpus >= 128))
    record["left_out"]["16k tokens and more"] = asdict(left_out(runs, lambda run: run.layout.seq_len >= 16_384))
    return record
