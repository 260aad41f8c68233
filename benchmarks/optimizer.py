"""AdamW as the benchmarks' training steps use it; a rate that barely moves the weights is enough to be timed."""

from internlm2.config import OptimConfig

OPTIM = OptimConfig(
    lr=3e-4,
    min_lr_ratio=0.1,
    schedule="cosine",
    schedule_start=0.0,
    schedule_end=1.0,
    warmup_ratio=0.0,
    beta1=0.9,
    beta2=0.95,
    eps=1e-8,
    weight_decay=0.1,
    decay_embeddings=False,
    clip_grad_norm=1.0,
)
