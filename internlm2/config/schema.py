"""The typed, closed schema of conf/: types, bounds and choices. Values, comments and defaults stand in the YAML files.

No field has a default here (`MISSING`), so that each default stands in one place. Imports nothing heavy: a wrong config
must fail within a second or two.
"""

from dataclasses import dataclass, field

from omegaconf import MISSING

from internlm2.config.cluster import ClusterConfig, LaunchConfig
from internlm2.config.generation import FrozenConfig, GenerationConfig
from internlm2.config.keys import key as _key
from internlm2.config.length_proof import LengthProofConfig
from internlm2.config.optim import OptimConfig
from internlm2.config.ppo import PPOConfig, PromptsConfig
from internlm2.config.precision import DTYPES
from internlm2.config.reward import ConflictConfig, RewardConfig
from internlm2.config.rounds import RoundsConfig
from internlm2.config.zero import ENGINES, ZeroConfig


@dataclass
class RopeScalingConfig:
    """Extrapolation beyond `max_position_embeddings`; the released chat models use dynamic NTK, factor 2 or 3."""

    kind: str = _key(choices=("none", "linear", "dynamic"))
    factor: float = _key(minimum=1.0)


@dataclass
class ModelConfig:
    """Shape of one InternLM2 network. `wqkv` has (heads + 2 * kv_heads) * head_dim rows."""

    name: str = MISSING
    vocab_size: int = _key(minimum=1)
    hidden_size: int = _key(minimum=1)
    layers: int = _key(minimum=1)
    heads: int = _key(minimum=1)
    kv_heads: int = _key(minimum=1)
    head_dim: int = _key(minimum=2)
    intermediate_size: int = _key(minimum=1)
    norm_eps: float = _key(minimum=0.0)
    rope_base: float = _key(minimum=1.0)
    rope_scaling: RopeScalingConfig = field(default_factory=RopeScalingConfig)
    max_position_embeddings: int = _key(minimum=1)
    initializer_range: float = _key(minimum=0.0)
    tie_embeddings: bool = MISSING
    # Tokens per optimizer step in the report's pre-training of this size (report, Table 3).
    pretrain_batch_tokens: int = _key(minimum=1)

    @property
    def q_per_kv(self) -> int:
        """Query heads that share one key/value head."""
        return self.heads // self.kv_heads

    def parameters(self) -> dict[str, int]:
        """Parameter counts by part, from the shapes alone."""
        attention = self.hidden_size * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        layer = attention + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size
        embedding = self.vocab_size * self.hidden_size
        total = self.layers * layer + self.hidden_size + embedding * (1 if self.tie_embeddings else 2)
        return {"total": total, "non_embedding": total - embedding, "embedding": embedding, "layer": layer}


@dataclass
class TokenizerConfig:
    """Where token ids come from: trained in the run, a SentencePiece model, a Hugging Face tokenizer.json, or the words
    of the toy language.

    `aliases` gives a marker such as `<|reward|>` a spare piece of a vocabulary that has none for it.
    """

    kind: str = _key(choices=("train", "inherit", "sentencepiece", "huggingface", "toy"))
    path: str | None = MISSING
    vocab_size: int | None = _key(minimum=300)
    train_bytes: int = _key(minimum=1)
    aliases: dict[str, str] = field(default_factory=dict)


SOURCE_KINDS = (
    "stdlib",
    "jsonl",
    "parquet",
    "text",
    "internevo",
    "conversations",
    "preferences",
    "package",
    "toy",
    "needles",
)


@dataclass
class SourceConfig:
    """One source of documents. `part` belongs to kind=stdlib, package, toy and needles, `field` to kind=jsonl and
    parquet, `format` to kind=conversations, `domain` to kind=preferences.
    """

    kind: str = field(default=MISSING, metadata={"choices": SOURCE_KINDS})
    path: str | None = None
    part: str | None = None
    format: str = field(
        default="auto", metadata={"choices": ("auto", "openai", "sharegpt", "alpaca", "xtuner", "pairs")}
    )
    domain: str = "default"
    field: str = "text"


@dataclass
class LengthBucketConfig:
    """Share of the tokens that comes from documents of min_tokens <= length < max_tokens (null: no limit)."""

    weight: float = field(default=MISSING, metadata={"minimum": 0.0})
    min_tokens: int | None = None
    max_tokens: int | None = None


@dataclass
class DataConfig:
    """Sources, their mixture (in tokens, for each stage), and how documents become rows of `train.seq_len` tokens."""

    name: str = MISSING
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    sources: dict[str, SourceConfig] = MISSING
    weights: dict[str, dict[str, float]] = MISSING
    length_buckets: list[LengthBucketConfig] = MISSING
    packing: str = _key(choices=("concatenate", "best_fit"))
    long_conversations: str = _key(choices=("split", "cut", "drop"))
    validation_fraction: float = _key(minimum=0.0, maximum=0.5)
    cache_dir: str = MISSING
    workers: int | None = _key(minimum=1)
    strict: bool = MISSING
    on_change: str = _key(choices=("refuse", "accept"))


@dataclass
class AdapterConfig:
    """Low-rank adapters on a frozen model; kind=none trains all weights. `bits` belongs to kind=qlora."""

    kind: str = _key(choices=("none", "lora", "qlora"))
    rank: int = _key(minimum=1)
    alpha: float = _key(minimum=0.0)
    dropout: float = _key(minimum=0.0, maximum=0.99)
    targets: list[str] = MISSING
    bits: int = _key(minimum=4, maximum=8)


@dataclass
class EngineConfig:
    """How one training step runs on the hardware."""

    name: str = _key(choices=ENGINES)
    device: str = _key(choices=("auto", "cpu", "cuda"))
    dtype: str = _key(choices=DTYPES)
    attention: str = _key(choices=("auto", "native", "flash_attn", "torch_varlen", "sdpa", "reference"))
    recompute: str = _key(choices=("none", "full"))
    threads: int | None = _key(minimum=1)
    on_nonfinite: str = _key(choices=("skip", "stop", "rollback"))
    spike_factor: float | None = _key(minimum=1.0)
    max_bad_steps: int = _key(minimum=1)
    sequence_parallel: int = _key(minimum=1)
    collective_seconds: float = _key(minimum=1.0)
    hang_seconds: float | None = _key(minimum=1.0)
    straggler_factor: float = _key(minimum=1.0)
    zero: ZeroConfig = field(default_factory=ZeroConfig)


@dataclass
class TrainConfig:
    """Length and size of a stage: `steps` if given, else as many as `tokens` need, else `epochs` over its data."""

    seq_len: int = _key(minimum=2)
    batch_tokens: int = _key(minimum=1)
    micro_batch: int = _key(minimum=1)
    steps: int | None = _key(minimum=1)
    tokens: int | None = _key(minimum=1)
    epochs: float | None = _key(minimum=0.0)

    @property
    def rows_per_step(self) -> int:
        """Rows of seq_len tokens in one optimizer step, over all ranks and micro-batches."""
        return self.batch_tokens // self.seq_len

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the stage."""
        return self.steps or max(1, (self.tokens or 0) // self.batch_tokens)

    @property
    def by_epochs(self) -> bool:
        """Does the length of the stage follow from its data?"""
        return self.steps is None and self.tokens is None


@dataclass
class ValidateConfig:
    """Loss on held-out documents, by source and by position."""

    every: int | None = _key(minimum=1)
    rows: int = _key(minimum=1)
    seq_len: int | None = _key(minimum=2)
    compare_with_init: bool = MISSING
    answers: int = _key(minimum=0)


@dataclass
class CheckpointConfig:
    """When checkpoints are written and which of them stay."""

    every: int | None = _key(minimum=1)
    keep_last: int = _key(minimum=1)
    keep_every: int | None = _key(minimum=1)
    keep_best: bool = MISSING
    asynchronous: bool = MISSING
    export: bool = MISSING


@dataclass
class WandbConfig:
    """Weights & Biases; `offline` writes below the run directory and needs no account."""

    mode: str = _key(choices=("disabled", "offline", "online"))
    project: str = MISSING


@dataclass
class RunConfig:
    """What a run shows and writes while it goes."""

    log_every: int = _key(minimum=1)
    peak_tflops: float | None = _key(minimum=0.0)
    samples: list[str] = MISSING
    sample_tokens: int = _key(minimum=1)
    wandb: WandbConfig = field(default_factory=WandbConfig)


@dataclass
class StageConfig:
    """Which stage runs; `stages` is the order of `stage=recipe`."""

    name: str = MISSING
    kind: str = _key(choices=("pretrain", "sft", "reward", "conflict", "ppo", "length_proof", "recipe"))
    previous: str | None = MISSING
    stages: list[str] = MISSING


@dataclass
class Config:
    """The whole composed config of one run."""

    name: str = MISSING
    root: str = MISSING
    seed: int = _key(minimum=0)
    init_from: str | None = MISSING
    resume: bool = MISSING
    stage: StageConfig = field(default_factory=StageConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    validate: ValidateConfig = field(default_factory=ValidateConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    run: RunConfig = field(default_factory=RunConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    plan: bool = MISSING
    dry_run: bool = MISSING
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    frozen: FrozenConfig = field(default_factory=FrozenConfig)
    reward: RewardConfig | None = None  # of stage=rm alone; null elsewhere
    conflict: ConflictConfig | None = None  # of experiment=conflict alone
    # Of stage=ppo alone; null elsewhere.
    prompts: PromptsConfig | None = None
    ppo: PPOConfig | None = None
    rounds: RoundsConfig | None = None
    length_proof: LengthProofConfig | None = None  # of stage=length_proof alone
