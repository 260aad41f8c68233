"""The report: one self-contained HTML page for a stage, or for a run with all its stages. Needs no network to read."""

import math
from collections.abc import Sequence
from datetime import datetime, timezone
from html import escape
from pathlib import Path

from internlm2.run.atomic import replace_text
from internlm2.run.console import duration, quantity
from internlm2.run.evaluation_section import evaluation, gains
from internlm2.run.figures import Series, line_figure, smooth
from internlm2.run.page_elements import figure, table
from internlm2.run.page_style import STYLE
from internlm2.run.stage_summary import StageSummary, read_stage
from internlm2.run.throughput import FORMULA


def write_stage_report(stage: Path) -> Path:
    """Write `stage`/report.html and return its path."""
    summary = read_stage(stage)
    body = [
        f"<h1>{escape(stage.parent.name)} / {escape(summary.name)}{_status(summary)}</h1>",
        *_stage_sections(summary),
        _footer(),
    ]
    return _write(stage / "report.html", f"{stage.parent.name} / {summary.name}", body)


def write_report(run_root: Path, stages: Sequence[str] | None = None) -> Path:
    """Write `run_root`/report.html over its stages and return its path.

    `stages`: names in the order of the recipe; by default every directory below with metrics or figures (a stage's
    own, and those inside it, such as the rounds of PPO), in the order of their first start.
    """
    if stages is None:
        folders = {file.parent for file in run_root.rglob("metrics.jsonl")}
        folders |= {file.parent.parent for file in run_root.rglob("evaluation/*.json")}  # stages that train nothing
        found = [read_stage(folder, folder.relative_to(run_root).as_posix()) for folder in sorted(folders)]
        found.sort(key=lambda stage: stage.starts[0]["time"] if stage.starts else "")
    else:
        found = [read_stage(run_root / name, name) for name in stages if (run_root / name / "metrics.jsonl").exists()]
    if not found:
        raise FileNotFoundError(f"{run_root} has no stage with a metrics.jsonl: there is nothing to report.")
    body = [
        f"<h1>{escape(run_root.name)}</h1>",
        f"<p>{_whole_story(found)}</p>",
        "<nav>" + "".join(f'<a href="#{escape(s.name)}">{escape(s.name)}</a>' for s in found) + "</nav>",
        _overview(found),
        *_joined_curve(found),
    ]
    for stage in found:
        body.append(f'<h2 id="{escape(stage.name)}">{escape(stage.name)}{_status(stage)}</h2>')
        body += _stage_sections(stage)
    body.append(_footer())
    return _write(run_root / "report.html", run_root.name, body)


def _write(path: Path, title: str, body: Sequence[str]) -> Path:
    head = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>\n{STYLE}</style></head>"
    )
    replace_text(path, f"{head}\n<body><main>\n" + "\n".join(body) + "\n</main></body></html>\n")
    return path


def _stage_sections(stage: StageSummary) -> list[str]:
    parts = [f"<p>{_story(stage)}</p>", _tiles(stage)]
    parts += [f'<p class="bad">{escape(problem)}</p>' for problem in stage.problems]
    parts += [_curves(stage), *_validation(stage), *evaluation(stage.figures)]
    if stage.not_applied():
        rows = [{"step": r["step"], "reason": r.get("reason", "")} for r in stage.not_applied()]
        parts += [f"<h3>Steps without an update: {len(rows)}</h3>", table(rows[:50])]
    if stage.data:
        parts += ["<h3>Data that the stage trained on</h3>", table(stage.data)]
    if stage.handover:
        parts += ["<h3>Handed over from the stage before</h3>", table(stage.handover)]
    if stage.samples:
        parts.append("<h3>What the model writes</h3>")
        parts += [
            f'<p class="soft">{escape(name)}</p><pre>{escape(text)}</pre>' for name, text in stage.samples.items()
        ]
    parts += _origin(stage)
    return parts


def _story(stage: StageSummary) -> str:
    losses = [loss for loss in stage.column("loss") if loss is not None]
    if not losses:
        return f"{stage.steps:,} steps, {duration(stage.seconds)}." if stage.steps else "No step has been recorded."
    text = f"The training loss went from {losses[0]:.3f} to {stage.last('loss'):.3f} in {stage.steps:,} steps"
    text += f" and {quantity(stage.tokens)} tokens" if stage.tokens else ""
    text += f", {duration(stage.seconds)} of training" if stage.timing else ""
    resumed = len(stage.starts) - 1
    return text + (f", over {resumed + 1} starts." if resumed > 0 else ".")


def _whole_story(stages: Sequence[StageSummary]) -> str:
    tokens, seconds = sum(s.tokens for s in stages), sum(s.seconds for s in stages)
    plural = "s" if len(stages) > 1 else ""
    return f"{len(stages)} stage{plural}, {quantity(tokens)} tokens, {duration(seconds)} of training."


def _status(stage: StageSummary) -> str:
    kind = {"finished": "good", "failed": "bad"}.get(stage.status, "soft")
    return f'<span class="status {kind}">{escape(stage.status)}</span>'


def _tiles(stage: StageSummary) -> str:
    loss, speed, mfu = stage.last("loss"), stage.typical("tokens_per_second"), stage.typical("mfu")
    memory = max((r.get("memory_bytes") or 0 for r in stage.timing), default=0)
    tiles = [
        (f"{loss:.3f}", f"loss, mean of the last {min(20, len(stage.metrics))} steps") if loss is not None else None,
        (f"{stage.steps:,}", "steps"),
        (quantity(stage.tokens), "tokens") if stage.tokens else None,
        (f"{quantity(speed)}/s", "tokens, median step") if speed is not None else None,
        (f"{mfu:.1%}", "MFU, median step") if mfu is not None else None,
        (f"{memory / 2**30:.1f} GiB", "peak memory") if memory else None,
        (duration(stage.seconds), "in steps") if stage.timing else None,
    ]
    return (
        '<div class="tiles">'
        + "".join(f'<div class="tile"><b>{v}</b><span>{t}</span></div>' for v, t in filter(None, tiles))
        + "</div>"
    )


def _curves(stage: StageSummary) -> str:
    steps = [record["step"] for record in stage.metrics]
    if not steps:
        return ""
    half_life = max(2.0, len(steps) / 60)
    figures = []
    for key, name, unit in (
        ("loss", "Training loss", "nats a token" if stage.predicts_tokens else "loss"),
        ("accuracy", "Training accuracy", "share of pairs"),
        ("grad_norm", "Gradient norm, before clipping", "norm"),
    ):
        values = stage.column(key)
        if any(value is not None for value in values):
            raw = Series("each step", steps, values, faint=True, colour=0)
            mean = Series(f"mean, half-life {half_life:.0f} steps", steps, smooth(values, half_life), colour=0)
            figures.append(figure(line_figure([raw, mean], "step", unit, title=name), name))
    if any(value is not None for value in stage.column("lr")):
        rate = [Series("lr", steps, stage.column("lr"), colour=2)]
        drawing = line_figure(rate, "step", "learning rate", title="Learning rate", from_zero=True)
        figures.append(figure(drawing, "Learning rate"))
    if any(record.get("tokens_per_second") is not None for record in stage.timing):
        at = [record["step"] for record in stage.timing]
        speed = [record.get("tokens_per_second") for record in stage.timing]
        lines = [
            Series("each step", at, speed, faint=True, colour=3),
            Series("mean", at, smooth(speed, half_life), colour=3),
        ]
        drawing = line_figure(lines, "step", "tokens / s", title="Throughput", from_zero=True)
        figures.append(figure(drawing, "Throughput"))
    return f'<div class="figures">{"".join(figures)}</div>' if figures else ""


def _validation(stage: StageSummary) -> list[str]:
    curves = stage.validation()
    if not curves:
        return []
    rows = []
    for source, (_, losses) in curves.items():
        known = [loss for loss in losses if loss is not None]
        first, last = (known[0], known[-1]) if known else (math.nan, math.nan)
        measured = stage.last_validation().get(source, {})
        rows.append(
            {
                "source": source,
                "first loss": first,
                "last loss": last,
                "perplexity": math.exp(min(last, 50.0)),
                "bits per byte": measured.get("bits_per_byte"),
                "held-out tokens": measured.get("tokens"),
            }
        )
    parts = ["<h3>Validation loss by source</h3>"]
    if max(len(steps) for steps, _ in curves.values()) > 1:
        lines = [Series(source, steps, losses) for source, (steps, losses) in curves.items()]
        drawing = line_figure(lines, "step", "nats a token", title="Validation loss by source", wide=True)
        parts.append(f'<div class="figures">{figure(drawing, "On held-out documents", wide=True)}</div>')
    return [*parts, table(rows)]


def _joined_curve(stages: Sequence[StageSummary]) -> list[str]:
    """Training loss over all stages, against tokens, where the timing records tell the tokens of every step."""
    lines: list[Series] = []
    marks: list[tuple[float, str]] = []
    done = 0.0
    for number, stage in enumerate(stages):
        tokens = {record["step"]: record.get("tokens") or 0 for record in stage.timing}
        marks.append((done, stage.name))
        x = []
        for record in stage.metrics:
            done += tokens.get(record["step"], 0)
            x.append(done)
        values = stage.column("loss")
        lines.append(Series(stage.name, x, values, faint=True, colour=number))
        lines.append(Series(stage.name, x, smooth(values, max(2.0, len(x) / 60)), colour=number))
    if len(stages) < 2 or not done:
        return []
    drawing = line_figure(lines, "tokens", "nats a token", title="Training loss of all stages", wide=True, marks=marks)
    return [f'<div class="figures">{figure(drawing, "Training loss over the whole run", wide=True)}</div>']


def _overview(stages: Sequence[StageSummary]) -> str:
    rows = []
    for stage in stages:
        speed = stage.typical("tokens_per_second")
        rows.append(
            {
                "stage": stage.name,
                "status": stage.status,
                "what it gained": "; ".join(gains(stage)),
                "steps": stage.steps,
                "tokens": quantity(stage.tokens) if stage.tokens else None,
                "tokens / s": quantity(speed) if speed is not None else None,
                "time": duration(stage.seconds),
            }
        )
    return table(rows)


def _origin(stage: StageSummary) -> list[str]:
    rows = []
    for start in stage.starts:
        git, end = start.get("git") or {}, start.get("end") or {}
        commit = (git.get("commit") or "")[:12] + (" + changes" if git.get("dirty") else "")
        rows.append(
            {
                "started": _moment(start["time"]),
                "from step": start["step"],
                "ended": _moment(end.get("time")),
                "at step": end.get("step"),
                "how": end.get("status"),
                "commit": commit,
                "machine": ", ".join(start.get("accelerators") or [start.get("cpu") or ""]),
                "torch": start.get("packages", {}).get("torch"),
            }
        )
    parts = ["<h3>Where it comes from</h3>", table(rows)] if rows else []
    if stage.starts:
        parts.append(f'<p class="soft">Last command: <code>{escape(" ".join(stage.starts[-1]["command"]))}</code></p>')
    if stage.config:
        parts.append(f"<details><summary>Composed config</summary><pre>{escape(stage.config)}</pre></details>")
    return parts


def _moment(time: str | None) -> str | None:
    return time[:16].replace("T", " ") if time else None


def _footer() -> str:
    now = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    return f'<h2>Notes</h2><p class="soft">{escape(FORMULA)}.</p><p class="soft">Written {now}.</p>'
