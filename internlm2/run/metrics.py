"""Metrics: what was learnt (metrics.jsonl, identical after a resume), how fast (timing.jsonl), and Weights & Biases."""

import json
import math
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

from internlm2.config.schema import WandbConfig
from internlm2.run.atomic import replace_text
from internlm2.run.directory import RunDirectory

Value = float | int | str | bool | None | Mapping[str, Any] | list[Any]


class JsonLines:
    """A file of JSON records, one a line, in the order of their `step`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: Any = None

    def append(self, record: Mapping[str, Value]) -> None:
        """Add one record, in one write; NaN and infinity become null, which every JSON reader knows."""
        if self._file is None:
            self._file = open(self.path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115 (closed by close)
        try:
            self._file.write(json.dumps(_finite(record), ensure_ascii=False, allow_nan=False) + "\n")
        except OSError as error:  # such as a full disk; Python does not say of which file
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def truncate_after(self, step: int) -> int:
        """Drop the records of steps after `step`, and a last line that a kill cut short; returns how many went."""
        self.close()
        if not self.path.exists():
            return 0
        lines = self.path.read_text(encoding="utf-8", errors="replace").split("\n")
        kept = [line for line in lines if (record := _parse(line)) is not None and record.get("step", 0) <= step]
        dropped = len([line for line in lines if line]) - len(kept)
        if dropped or (lines and lines[-1]):
            replace_text(self.path, "".join(f"{line}\n" for line in kept))
        return dropped

    def close(self) -> None:
        """Close the file; the next append opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON-lines file; an unfinished last line is left out, a missing file is empty."""
    if not path.exists():
        return []
    return [
        r for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if (r := _parse(line)) is not None
    ]


class Metrics:
    """Records of one run. On ranks other than 0 (`enabled=False`) it does nothing.

    metrics.jsonl takes only values that are functions of config, seed and data, so that an interrupted run and an
    uninterrupted one leave the same file; everything that a clock or a machine decides belongs into timing.jsonl.
    """

    def __init__(
        self, run: RunDirectory, wandb: WandbConfig, *, config: Mapping[str, Any], enabled: bool = True
    ) -> None:
        self.enabled = enabled
        self._metrics, self._timing = JsonLines(run.metrics), JsonLines(run.timing)
        self._wandb: Any = None
        if enabled and wandb.mode != "disabled":
            self._wandb = _start_wandb(run, wandb, config)

    def record(self, step: int, values: Mapping[str, Value], timing: Mapping[str, Value]) -> None:
        """One step's record in each file; `step` counts finished steps, from 1. Values may be nested."""
        if not self.enabled:
            return
        self._metrics.append({"step": step, **values})
        self._timing.append({"step": step, **timing})
        if self._wandb is not None:
            self._wandb.log({"step": step, **_flat(values), **{f"timing/{k}": v for k, v in _flat(timing).items()}})

    def truncate_after(self, step: int) -> None:
        """A resume from the checkpoint of `step` goes on there: records of later steps will be made again."""
        if self.enabled:
            self._metrics.truncate_after(step)
            self._timing.truncate_after(step)

    def close(self) -> None:
        """Close the files and finish the Weights & Biases run."""
        self._metrics.close()
        self._timing.close()
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None


def _start_wandb(run: RunDirectory, settings: WandbConfig, config: Mapping[str, Any]) -> Any:
    """A wandb run whose id is kept in the run directory, so that a resumed run goes on in the same one."""
    import wandb  # slow to import, and needed by few

    identity = run.path / "wandb.json"
    if not identity.exists():
        replace_text(identity, json.dumps({"id": uuid.uuid4().hex[:8]}) + "\n")
    name = f"{run.path.parent.name}/{run.path.name}"
    started = wandb.init(
        project=settings.project,
        id=json.loads(identity.read_text())["id"],
        name=name,
        group=run.path.parent.name,
        dir=run.path,
        mode=cast(Literal["offline", "online"], settings.mode),
        resume="allow",
        config=dict(config),
    )
    # Steps are our own axis: after a resume they may be ones that wandb has seen, which its own counter would refuse.
    started.define_metric("step")
    started.define_metric("*", step_metric="step")
    return started


def _parse(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return None
    return record if isinstance(record, dict) else None


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update({f"{key}/{inner}": item for inner, item in _flat(value).items()})
        else:
            flat[key] = value
    return flat
