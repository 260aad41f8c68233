"""Settings of the stage that measures what the long-context stage gained."""

from dataclasses import dataclass

from omegaconf import MISSING

from internlm2.config.keys import key as _key


@dataclass
class LengthProofConfig:
    """Needles in haystacks for two finished stages, and for the second with dynamic NTK."""

    before: str = MISSING
    after: str = MISSING
    multiples: list[int] = MISSING
    depths: list[float] = MISSING
    repeats: int = _key(minimum=1)
    ntk_factor: float = _key(minimum=1.0)
