"""Learning rate as a pure function of the step, so that a resumed, resharded or extended run needs no scheduler
state.
"""

import math

from internlm2.config.schema import OptimConfig


def decay_curve(kind: str, position: float, min_ratio: float) -> float:
    """Height of the curve at `position` in [0, 1], as a share of the peak: 1 at 0, `min_ratio` at 1."""
    if kind == "constant":
        return 1.0
    if kind == "linear":
        return 1.0 - (1.0 - min_ratio) * position
    if kind == "cosine":
        return min_ratio + (1.0 - min_ratio) * 0.5 * (1.0 + math.cos(math.pi * position))
    raise ValueError(f"optim.schedule={kind} is unknown: use cosine, linear or constant.")


def warmup_steps(total_steps: int, warmup_ratio: float) -> int:
    """Steps of linear warm-up in a stage of `total_steps`."""
    return min(total_steps, round(total_steps * warmup_ratio))


def learning_rate(step: int, total_steps: int, optim: OptimConfig) -> float:
    """Learning rate of step `step` (0-based) of a stage of `total_steps` steps.

    Warm-up climbs linearly from zero to where the stage enters the curve; it counts from the start of the stage.
    After it, the stage walks the part [schedule_start, schedule_end] of one curve and its last step stands exactly at
    `schedule_end`: a 4k stage on [0, 0.909] and a 32k stage on [0.909, 1] are one cosine that ends at min_lr_ratio of
    the peak (3e-4 -> 3e-5, report 3.2.2). Steps beyond the last stay at the end of the part.
    """
    warmup = warmup_steps(total_steps, optim.warmup_ratio)
    if step < warmup:
        return optim.lr * decay_curve(optim.schedule, optim.schedule_start, optim.min_lr_ratio) * (step + 1) / warmup
    walked = min(1.0, (step + 1 - warmup) / max(1, total_steps - warmup))
    position = optim.schedule_start + (optim.schedule_end - optim.schedule_start) * walked
    return optim.lr * decay_curve(optim.schedule, position, optim.min_lr_ratio)
