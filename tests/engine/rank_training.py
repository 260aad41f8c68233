"""Engines over forked ranks for tests: their config, and a training run whose data depend on the step alone."""

from typing import Any

from tiny_training import OPTIM, Model, Rows, cross_entropy, make_rows, split

from internlm2.config import EngineConfig
from internlm2.config.zero import ZeroConfig
from internlm2.engine.base import Engine
from internlm2.engine.build import build_engine

ROWS = 8
SPLITTING = 3e-5  # the round-off of splitting a batch in another way


def engine_config(name: str, **changes: Any) -> EngineConfig:
    """engine=`name` on CPU in fp32; keys of the group and of `zero` may be changed."""
    zero: dict[str, Any] = {"offload": "none", "shard_group": None, "overlap": False, "reduce_dtype": "fp32"}
    zero |= {"reduce_bucket": 200, "gather_bucket": 200, "live_parameters": 10**6, "persistent_parameters": 20}
    zero |= {key: changes.pop(key) for key in list(changes) if key in zero}
    values: dict[str, Any] = {"name": name, "device": "cpu", "dtype": "fp32", "attention": "auto", "recompute": "none"}
    values |= {"threads": 1, "on_nonfinite": "skip", "spike_factor": None, "max_bad_steps": 3}
    values |= {"sequence_parallel": 1, "collective_seconds": 60.0, "hang_seconds": None, "straggler_factor": 1.5}
    return EngineConfig(**(values | {"zero": ZeroConfig(**zero)} | changes))


def start(name: str, seed: int = 0, **changes: Any) -> Engine:
    """An engine around the small model, for a run of 40 steps."""
    return build_engine(Model(seed), engine_config(name, **changes), OPTIM, 40)


def step_rows(engine: Engine, rows: Rows, micro_batch: int = 2) -> list[Rows]:
    """This rank's micro-batches of a step; a rank may have fewer than another, or none."""
    mine = Rows(rows.ids[engine.data_rank :: engine.data_ranks], rows.labels[engine.data_rank :: engine.data_ranks])
    return split(mine, micro_batch) if len(mine.ids) else []


def train(engine: Engine, steps: int, rows: int = ROWS) -> list[list[float]]:
    """[loss, gradient norm, learning rate, tokens, right] of each step."""
    records = []
    for step in range(engine.step, engine.step + steps):
        result = engine.train_step(step_rows(engine, make_rows(rows, seed=step)), cross_entropy)
        assert result.applied
        records.append([result.loss, result.grad_norm, result.lr, float(result.loss_tokens), result.parts["right"]])
    return records


def run(name: str, steps: int, rows: int = ROWS, **changes: Any) -> dict[str, Any]:
    """Train from the start: the records, the evaluation of four rows, and the weights in full."""
    engine = start(name, **changes)
    records = train(engine, steps, rows)
    evaluated = engine.evaluate(step_rows(engine, make_rows(4, seed=99)), cross_entropy)
    return {
        "records": records,
        "evaluated": [evaluated.loss, float(evaluated.tokens), evaluated.parts["right"]],
        "weights": {name: weight.clone() for name, weight in engine.full_weights()},
    }
