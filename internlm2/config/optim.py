"""AdamW and its learning-rate schedule: of the model in training, and of PPO's critic beside it."""

from dataclasses import dataclass

from omegaconf import MISSING

from internlm2.config.keys import key as _key


@dataclass
class OptimConfig:
    """AdamW and its learning-rate schedule."""

    lr: float = _key(minimum=0.0)
    min_lr_ratio: float = _key(minimum=0.0, maximum=1.0)
    schedule: str = _key(choices=("cosine", "linear", "constant"))
    schedule_start: float = _key(minimum=0.0, maximum=1.0)
    schedule_end: float = _key(minimum=0.0, maximum=1.0)
    warmup_ratio: float = _key(minimum=0.0, maximum=1.0)
    beta1: float = _key(minimum=0.0, maximum=1.0)
    beta2: float = _key(minimum=0.0, maximum=1.0)
    eps: float = _key(minimum=0.0)
    weight_decay: float = _key(minimum=0.0)
    decay_embeddings: bool = MISSING
    clip_grad_norm: float = _key(minimum=0.0)
