"""A plan: what a stage takes on a cluster as configured, and the best setting that fits."""

from dataclasses import dataclass, replace

from internlm2.config import Config
from internlm2.plan.coefficients import fitted
from internlm2.plan.hardware import Hardware
from internlm2.plan.layout import OURS
from internlm2.plan.search import Candidate, Planner
from internlm2.plan.speed import SpeedModel
from internlm2.plan.work import Work, buffers, engine_layout


@dataclass(frozen=True)
class StagePlan:
    """One stage on `hardware`: `configured` is None where the keys cannot run there (`reason`), `best` where nothing
    fits; `smallest` then is the least number of GPUs that would do, if any.
    """

    stage: str
    work: Work
    hardware: Hardware
    gpus: int
    configured: Candidate | None
    reason: str
    best: Candidate | None
    smallest: int | None

    @property
    def chosen(self) -> Candidate | None:
        """The configured setting where it fits, else the best one."""
        if self.configured is not None and self.configured.fits(self.hardware):
            return self.configured
        return self.best

    def tokens_per_second(self, candidate: Candidate) -> float:
        """Tokens a second and GPU."""
        return self.work.tokens_per_step / candidate.time.total / self.gpus

    def mfu(self, candidate: Candidate) -> float:
        """Model FLOPs utilisation by the formula of a run's log, 0..1; every row is taken as one sequence."""
        flops = self.work.network.flops(self.work.tokens_per_step, self.work.seq_len)
        return flops / (candidate.time.total * self.gpus * self.hardware.peak_flops)

    def days(self, candidate: Candidate) -> float | None:
        """Days to the stage's last step; None where its length follows from the data."""
        return None if self.work.steps is None else self.work.steps * candidate.time.total / 86_400


def plan_stage(config: Config) -> StagePlan:
    """The plan of a supervised stage on `cluster`."""
    work, hardware = Work.of(config), Hardware.of(config.cluster)
    sizes = buffers(config)
    practice = replace(OURS, reduce_bytes=sizes.reduce_bytes)
    planner = Planner(work, hardware, SpeedModel(fitted().coefficients, hardware, practice), sizes)
    layout, reason = engine_layout(config, work.rows, work.seq_len, config.train.micro_batch)
    best = planner.best(config.cluster.gpus)
    return StagePlan(
        stage=config.stage.name,
        work=work,
        hardware=hardware,
        gpus=config.cluster.gpus,
        configured=None if layout is None else planner.cost(layout),
        reason=reason,
        best=best,
        smallest=None if best is not None else smallest(planner, config.cluster.gpus),
    )


def smallest(planner: Planner, gpus: int) -> int | None:
    """The least power-of-two multiple of `gpus` on which something fits, up to 64 times as many."""
    for factor in (2, 4, 8, 16, 32, 64):
        if planner.best(gpus * factor) is not None:
            return gpus * factor
    return None
