"""One round of online RLHF (report 4.2.3): critic warm-up, PPO with a pretraining loss, the best checkpoint.

`run_round` is a whole stage of its own in a run directory of its own: started again, it goes on where it stopped, and
leaves the metrics of a run that was never interrupted.
"""

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf
from rich.console import Console

from internlm2.config import Config, ConfigError
from internlm2.data.prepare import make_tokenizer, prepare
from internlm2.data.prompts import PromptStream
from internlm2.data.stream import TokenStream
from internlm2.engine.base import Engine
from internlm2.engine.checkpoint import CheckpointWriter
from internlm2.engine.checkpoint_format import CheckpointError, list_checkpoints, step_directory
from internlm2.engine.checkpoint_reader import CheckpointReader, restore_newest
from internlm2.engine.together import Together
from internlm2.rlhf.figures import figures
from internlm2.rlhf.kl import KLController
from internlm2.rlhf.rewards import RewardFunction
from internlm2.rlhf.sanity import findings
from internlm2.run.console import StepProgress
from internlm2.run.directory import RunDirectory
from internlm2.run.heartbeat import Heartbeat
from internlm2.run.metrics import Metrics, read_records
from internlm2.run.provenance import record_end, record_start
from internlm2.run.signals import StopSignals
from internlm2.run.throughput import peak_memory_bytes
from internlm2.stages.exporting import export_trained
from internlm2.stages.ppo_iteration import Iteration, Trainer, run_iteration
from internlm2.stages.ppo_models import build_models
from internlm2.stages.ppo_samples import keep_rollouts
from internlm2.stages.ppo_validation import Validation
from internlm2.stages.preparation import open_stream
from internlm2.stages.supervised import due
from internlm2.text.inherited_tokenizer import settle_tokenizer
from internlm2.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RoundResult:
    """What a round leaves behind.

    code      0, or 128 + the signal that stopped it (then the rest says how far it came)
    policy    the export of the chosen checkpoint, official InternLM2 layout
    step      iteration of that checkpoint
    best      {"step", "reward"} of the best validation; None where nothing was validated
    prompts   position in the prompt stream, where a next round goes on
    """

    code: int
    policy: Path
    step: int
    best: dict[str, float] | None
    prompts: int


@dataclass
class Round:
    """A round in progress: the parts of an iteration, and where it is written."""

    trainer: Trainer
    run: RunDirectory
    together: Together
    metrics: Metrics
    writer: CheckpointWriter
    validation: Validation
    hashes: dict[str, str]
    records: list[dict[str, Any]] = field(default_factory=list)
    warned: set[str] = field(default_factory=set)

    @property
    def iterations(self) -> int:
        """Of the round, critic warm-up included."""
        return self.trainer.ppo.critic_warmup + self.trainer.ppo.iterations

    def state(self) -> dict[str, Any]:
        """Everything that weights and moments do not hold. There are no generators: see Progress."""
        stream, progress = self.trainer.stream, self.trainer.progress
        return {
            "ppo": asdict(progress),
            "controller": self.trainer.controller.state_dict(),
            "frozen": self.hashes,
            "prompts": self.trainer.prompts.fingerprint,
            "data": None if stream is None else stream.state(progress.pretrain_position),
        }

    def save(self) -> None:
        self.together.step = self.trainer.progress.iteration
        self.writer.save(cast(Engine, self.together), self.state())


def run_round(
    config: Config,
    directory: RunDirectory,
    console: Console,
    *,
    policy: Path,
    reference: Path | None = None,
    reward: Path | RewardFunction | None = None,
    first_prompt: int = 0,
    after_iteration: Callable[[int, Iteration], None] | None = None,
) -> RoundResult:
    """Train a policy for one round in `directory`, from where it was or from the beginning, and export it.

    policy           what the actor starts from: a run directory, a checkpoint or an export
    reference        what KL is measured from; None: `policy`
    reward           a reward model (run directory, checkpoint or export), a function, or None for the config's rule
    first_prompt     where in the prompt stream the round begins, so that rounds see different prompts
    after_iteration  called with the number of finished iterations and what the last one did, before it is saved

    Whether the models fit into this machine is not asked here: `check_machine` does, before anything is loaded. Raises
    ConfigError for what the user can mend, TrainingStopped and CheckpointError.
    """
    tokenizer, stream = open_pretraining(config, directory, console)
    assert config.ppo is not None
    assert config.prompts is not None
    prompts = PromptStream(config.prompts, config.seed)
    models = build_models(
        config, policy=policy, reference=reference or policy, reward=reward, vocab_size=tokenizer.vocab_size
    )
    kl = config.ppo.kl
    trainer = Trainer(config, models, tokenizer, prompts, stream, KLController(kl.coefficient, kl.target, kl.horizon))
    trainer.progress.prompt_position = first_prompt
    round_ = start(trainer, directory)
    resumed = resume(round_)
    record_start(directory, step=trainer.progress.iteration, config=OmegaConf.to_yaml(OmegaConf.structured(config)))
    log.info(
        "%s iteration %d of %d (%d train the critic alone)",
        "resumed at" if resumed else "starts at",
        trainer.progress.iteration,
        round_.iterations,
        config.ppo.critic_warmup,
    )
    stop = train(round_, console, after_iteration)
    if stop.requested is not None:
        log.warning(stop.message(trainer.progress.iteration))
        record_end(directory, step=trainer.progress.iteration, status="stopped")
        return result(round_, stop.exit_code)
    return finish(round_)


def train(
    round_: Round, console: Console, after_iteration: Callable[[int, Iteration], None] | None = None
) -> StopSignals:
    """Iterate to the end or a signal; either way the iteration is saved."""
    trainer, progress, total = round_.trainer, round_.trainer.progress, round_.iterations
    actor, title = trainer.models.actor, round_.run.path.name
    alive = Heartbeat(round_.run.path, actor.rank, actor.world_size, trainer.config.engine.hang_seconds)
    with StopSignals() as stop, alive, StepProgress(console, title, total, progress.iteration) as bar:
        if progress.iteration == 0:
            first = {"held_out": round_.validation.measure(trainer, 0)}
            round_.metrics.record(0, first, {})
            round_.records = [{"step": 0, **first}]
        while progress.iteration < total:
            done = run_iteration(trainer)
            step = progress.iteration
            alive.beat(f"iteration {step}")
            last, asked = step == total, stop.agree(actor.reduce_sum)
            best = validate(round_, done, step, last)
            record(round_, done, step)
            if keeps(trainer, step):
                keep_rollouts(round_.run, f"rollouts_{step:08d}", done.rollouts, done.numbers)
            if after_iteration is not None:
                after_iteration(step, done)
            if due(trainer.config.checkpoint.every, step) or last or asked or best:
                round_.save()
                alive.beat(f"the save of iteration {step}")
            bar.advance(step, None)
            if asked:
                break
        round_.writer.wait()
    return stop


def keeps(trainer: Trainer, step: int) -> bool:
    """Are this iteration's answers kept? The first and the last of the actor's always are: early and late policy."""
    ppo = trainer.ppo
    edges = (ppo.critic_warmup + 1, ppo.critic_warmup + ppo.iterations)
    return ppo.keep_rollouts_every is not None and (due(ppo.keep_rollouts_every, step) or step in edges)


def validate(round_: Round, done: Iteration, step: int, last: bool) -> bool:
    """Measure where it is due; True where this is the best policy so far, which is then saved and kept."""
    trainer = round_.trainer
    trained = step - trainer.ppo.critic_warmup
    if trained < 1 or not (due(trainer.ppo.validation.every, trained) or last):
        return False
    measured = round_.validation.measure(trainer, step)
    done.values["held_out"] = measured
    reward = measured["all"]["reward"]
    if trainer.progress.best is None or reward > trainer.progress.best["reward"]:
        trainer.progress.best = {"step": step, "reward": reward}
        round_.writer.protected = {step}
        return True
    return False


def record(round_: Round, done: Iteration, step: int) -> None:
    """metrics.jsonl, timing.jsonl, the line that a person reads, what looks wrong, and the figures of the report."""
    trainer, seconds = round_.trainer, sum(done.seconds.values())
    timing = {"seconds": seconds, **done.seconds, "tokens": done.tokens, "tokens_per_second": done.tokens / seconds}
    round_.metrics.record(step, done.values, timing | {"memory_bytes": peak_memory_bytes()})
    if not round_.run.writes:
        return
    facts = {"step": step, "precision": trainer.config.engine.dtype, "old_logprobs": trainer.ppo.old_logprobs}
    round_.records.append(done.values | facts)
    if due(trainer.config.run.log_every, step) or "held_out" in done.values:
        log.info(iteration_line(step, round_.iterations, done))
    wrong = findings([r for r in round_.records if r.get("phase")])
    for name in wrong.keys() - round_.warned:
        log.warning("iteration %d: %s", step, wrong[name])
    round_.warned |= wrong.keys()
    if "held_out" in done.values or step == round_.iterations:
        write_figures(round_, wrong)


def write_figures(round_: Round, wrong: dict[str, str]) -> None:
    for name, figure in figures(round_.records).items():
        round_.run.write_json(f"evaluation/{name}.json", figure)
    round_.run.write_json("sanity.json", sorted(wrong.values()))


def iteration_line(step: int, total: int, done: Iteration) -> str:
    v, width = done.values, len(str(total))
    parts = [
        f"iteration {step:>{width}}/{total}",
        f"score {v['score']:6.3f}",
        f"KL {v['kl']:6.3f}",
        f"ended {v['ended']:4.0%}",
        f"length {v['length']:5.1f}",
        *([f"value loss {v['value_loss']:.3f}"] if "value_loss" in v else []),
        *([f"explained {v['explained_variance']:5.2f}"] if v.get("explained_variance") is not None else []),
        *([f"clipped {v['clipped']:4.1%}"] if "clipped" in v else ["critic alone"]),
        " + ".join(f"{phase} {seconds:.1f}" for phase, seconds in done.seconds.items()) + " s",
    ]
    if "held_out" in v:
        parts.append(f"held out {v['held_out']['all']['score']:.3f}")
    return " | ".join(parts)


def open_pretraining(config: Config, directory: RunDirectory, console: Console) -> tuple[Tokenizer, TokenStream | None]:
    """The tokenizer of the weights, and the stream of the pretraining loss where it has a coefficient."""
    assert config.ppo is not None
    config.data.tokenizer = settle_tokenizer(config)
    if config.ppo.pretrain.coefficient == 0:
        tokenizer = make_tokenizer(config.data, {}, {}, Path(config.data.cache_dir).expanduser())
        if directory.writes:
            tokenizer.save(directory.path / "tokenizer")
        return tokenizer, None
    weights = {name: weight for name, weight in config.data.weights[config.stage.name].items() if weight > 0}
    tokenizer, corpus = prepare(config.data, config.model.vocab_size, console.is_terminal, weights)
    if directory.writes:
        tokenizer.save(directory.path / "tokenizer")
    return tokenizer, open_stream(config.data, corpus, weights, config)


def start(trainer: Trainer, directory: RunDirectory) -> Round:
    """Checkpoints, metrics and validation around the trainer."""
    config, models = trainer.config, trainer.models
    engines = {"": models.actor} | ({"critic.": models.critic} if models.critic is not None else {})
    actor, checkpoint = models.actor, config.checkpoint
    writer = CheckpointWriter(
        directory.checkpoints,
        rank=actor.rank,
        world_size=actor.world_size,
        keep_last=checkpoint.keep_last,
        keep_every=checkpoint.keep_every,
        asynchronous=checkpoint.asynchronous,
    )
    return Round(
        trainer,
        directory,
        Together(engines),
        Metrics(directory, config.run.wandb, config=asdict(config), enabled=directory.writes),
        writer,
        Validation(trainer, directory),
        models.hashes(),
    )


def resume(round_: Round) -> bool:
    """Go on from the newest whole checkpoint, if there is one; its frozen models must be the ones at hand."""
    trainer, directory = round_.trainer, round_.run.checkpoints
    found = list_checkpoints(directory)
    if found and not trainer.config.resume:
        raise ConfigError(f"resume=false, but {round_.run.path} holds a run: choose another name=.")
    state, _ = restore_newest(cast(Engine, round_.together), directory)
    if state is None:
        if found:
            raise CheckpointError(f"None of the checkpoints in {directory} can be read: move them away to start anew.")
        round_.metrics.truncate_after(-1)
        return False
    for name, digest in round_.hashes.items():
        if state["frozen"].get(name) != digest:
            raise ConfigError(
                f"{round_.run.path} was trained with another {name} model than the one given now: its rewards or KL "
                "would mean something else. Restore it, or choose another name=."
            )
    trainer.prompts.check_fingerprint(state["prompts"])
    if trainer.stream is not None and state["data"] is not None:
        trainer.stream.check_fingerprint(state["data"], trainer.config.data.on_change)
    restore_progress(trainer, state)
    if trainer.progress.best is not None:
        round_.writer.protected = {int(trainer.progress.best["step"])}
    round_.metrics.truncate_after(trainer.progress.iteration)
    round_.records = read_records(round_.run.metrics)
    return True


def restore_progress(trainer: Trainer, state: dict[str, Any]) -> None:
    saved, progress = state["ppo"], trainer.progress
    for name in ("iteration", "prompt_position", "pretrain_position", "initial_score", "best"):
        setattr(progress, name, saved[name])
    progress.moments.load_state_dict(saved["moments"])
    trainer.controller.load_state_dict(state["controller"])


def finish(round_: Round) -> RoundResult:
    """The frozen models are what they were; export the chosen checkpoint; mark the round as complete."""
    trainer, run = round_.trainer, round_.run
    after = round_.trainer.models.hashes()
    for name, digest in round_.hashes.items():
        if after[name] != digest:
            raise CheckpointError(f"the frozen {name} model has changed during the round: its results mean nothing.")
    log.info("frozen models unchanged: %s", ", ".join(f"{name} {h[:12]}" for name, h in after.items()) or "none")
    export(round_, chosen_step(round_))
    done = {"step": trainer.ppo.iterations, "iterations": round_.iterations, "best": trainer.progress.best}
    run.write_json("finished.json", done | {"exported": chosen_step(round_), "frozen": after, "epochs": None})
    record_end(run, step=trainer.progress.iteration, status="finished")
    round_.metrics.close()
    return result(round_, 0)


def chosen_step(round_: Round) -> int:
    """The best on validation (report 4.2.3), or the last."""
    best = round_.trainer.progress.best
    chosen = round_.trainer.ppo.validation.select == "best" and best is not None
    return int(best["step"]) if chosen and best is not None else round_.trainer.progress.iteration


def export(round_: Round, step: int) -> None:
    """export/ and, with adapters, adapter/ in PEFT's format, of iteration `step`."""
    trainer, run = round_.trainer, round_.run
    config, folder = trainer.config, step_directory(run.checkpoints, step)
    if not config.checkpoint.export:
        return
    if config.adapter.kind != "none":
        CheckpointReader(folder).restore(cast(Engine, round_.together))
    with trainer.models.actor.whole() as model:
        if run.writes:
            description = f"official InternLM2 layout, iteration {step}"
            export_trained(model, config, run, checkpoint=folder, description=description)


def result(round_: Round, code: int) -> RoundResult:
    progress = round_.trainer.progress
    return RoundResult(code, round_.run.export, chosen_step(round_), progress.best, progress.prompt_position)
