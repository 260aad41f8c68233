"""What PPO's models take in memory, from shapes alone: the arithmetic that refuses a run before anything is loaded."""

from dataclasses import dataclass

from internlm2.config.errors import ConfigError
from internlm2.config.schema import Config

BYTES = {"auto": 2, "bf16": 2, "fp32": 4}  # auto where nothing has settled it yet: as on a GPU
_QUANTIZED = {"w8": 1.0, "w4": 0.5}


@dataclass(frozen=True)
class ModelMemory:
    """Bytes of one model on one rank."""

    name: str
    parameters: int
    weights: float
    masters: float = 0.0
    moments: float = 0.0
    gradients: float = 0.0

    @property
    def total(self) -> float:
        return self.weights + self.masters + self.moments + self.gradients

    def sentence(self) -> str:
        """actor 309.2 GiB = weights 36.9 + masters 73.9 + moments 147.8 + gradients 73.9"""
        parts = [("weights", self.weights), ("masters", self.masters), ("moments", self.moments)]
        parts.append(("gradients", self.gradients))
        shown = " + ".join(f"{name} {_gib(size)}" for name, size in parts if size)
        return f"{self.name} {_gib(self.total)} GiB" + (f" = {shown}" if shown.count("+") else "")


def ppo_memory(config: Config, ranks: int = 1) -> list[ModelMemory]:
    """Actor, critic, reference, reward model and the sampler's packed weights, on each of `ranks` processes.

    Trained in bf16: weights 2 bytes a parameter, fp32 masters 4, two moments 8, fp32 gradient sums 4; in fp32 the
    weights are their own masters. ZeRO divides the masters and moments (zero1), gradients (zero2) and weights (zero3)
    among the ranks; frozen.shard does so with the frozen models. Activations and the KV cache come on top.
    """
    assert config.ppo is not None
    ppo, size = config.ppo, BYTES[config.engine.dtype]
    total = config.model.parameters()["total"]
    head = config.model.vocab_size * config.model.hidden_size * (0 if config.model.tie_embeddings else 1)
    models = [_trained("actor", total, config, ranks)]
    if ppo.has_critic:
        models.append(_trained("critic", total - head, config, ranks))
    spread = ranks if config.frozen.shard and config.engine.name != "single" else 1
    frozen = _QUANTIZED.get(config.frozen.quantize, size) / spread
    if config.adapter.kind == "none":
        models.append(ModelMemory("reference", total, total * frozen))
    if ppo.reward.kind == "model":
        models.append(ModelMemory("reward model", total - head, (total - head) * frozen))
    models.append(ModelMemory("sampler", total, total * _QUANTIZED.get(config.generation.quantize, size)))
    if config.adapter.kind != "none":
        models.append(ModelMemory("merged actor", total, total * size))
    return models


def check_memory(config: Config, available: float, where: str, ranks: int = 1) -> list[ModelMemory]:
    """ConfigError with the arithmetic where the models need more than the `available` bytes of each rank."""
    models = ppo_memory(config, ranks)
    needed = sum(model.total for model in models)
    if needed > available:
        raise ConfigError(
            f"stage={config.stage.name} with model={config.model.name} needs {_gib(needed)} GiB on each rank before "
            f"activations, and {where} has {_gib(available)} GiB free: "
            f"{'; '.join(model.sentence() for model in models)}. Use more ranks with engine=zero3, adapter=lora or "
            "qlora, frozen.quantize=w8, or a smaller model; ppo.check_memory=false tries it anyway."
        )
    return models


def _trained(name: str, parameters: int, config: Config, ranks: int) -> ModelMemory:
    size, adapter, engine = BYTES[config.engine.dtype], config.adapter, config.engine.name
    trained = parameters if adapter.kind == "none" else _adapter_parameters(config)
    base = _QUANTIZED["w8" if adapter.bits == 8 else "w4"] if adapter.kind == "qlora" else size
    weights = parameters * base + (trained * size if adapter.kind != "none" else 0)
    masters = trained * 4 if config.engine.dtype != "fp32" else 0
    share = {"zero1": (1, ranks, 1), "zero2": (1, ranks, ranks), "zero3": (ranks, ranks, ranks)}.get(engine, (1, 1, 1))
    return ModelMemory(
        name, parameters, weights / share[0], masters / share[1], trained * 8 / share[1], trained * 4 / share[2]
    )


def _adapter_parameters(config: Config) -> int:
    """rank * (inputs + outputs) of each adapted matrix."""
    model = config.model
    hidden, inner, wide = model.hidden_size, model.intermediate_size, model.heads * model.head_dim
    fused = (model.heads + 2 * model.kv_heads) * model.head_dim
    sizes = {
        "wqkv": hidden + fused,
        "wo": wide + hidden,
        "w1": hidden + inner,
        "w2": inner + hidden,
        "w3": hidden + inner,
    }
    return model.layers * config.adapter.rank * sum(sizes[name] for name in config.adapter.targets if name in sizes)


def _gib(size: float) -> str:
    return f"{size / 2**30:,.1f}"
