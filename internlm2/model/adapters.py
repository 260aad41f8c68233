"""LoRA and QLoRA on the official names (wqkv, wo, w1, w2, w3), with peft's modules and peft's files.

LoRA adds scaling * B A to a frozen weight, scaling = alpha / rank (Hu et al. 2021). QLoRA keeps the frozen weights in 4
or 8 bits (Dettmers et al. 2023; here with `internlm2.ops.quantized_linear`). Only A and B are trainable, so engines and
checkpoints hold nothing else. One LoRA on the fused wqkv is exactly three with a common A on q, k and v.
"""

import contextlib
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from internlm2.config import AdapterConfig, ConfigError, ModelConfig
from internlm2.model.layouts import OUTPUT, QKV, REWARD_HEAD, llama_shapes, split_wqkv
from internlm2.model.weights import Weights, model_weights
from internlm2.ops.quantized import QuantizedWeight, dequantize_weight, quantize_weight, quantized_linear

Model = TypeVar("Model", bound=nn.Module)

TARGETS = ("wqkv", "wo", "w1", "w2", "w3")
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_PEFT_PREFIX = "base_model.model."  # what PeftModel puts before the names of the model that it wraps
_MASK32 = (1 << 32) - 1


class QuantizedLinear(nn.Linear):
    """A frozen weight [N, K] in 4 or 8 bits; gradient flows to the input. It has buffers and no parameter."""

    packed: Tensor
    scales: Tensor
    zeros: Tensor

    def __init__(self, weight: Tensor, bits: int) -> None:
        nn.Module.__init__(self)
        made = quantize_weight(weight.contiguous(), bits)
        self.out_features, self.in_features, self.bits = made.out_features, made.in_features, bits
        self.register_parameter("bias", None)
        for name in ("packed", "scales", "zeros"):
            self.register_buffer(name, getattr(made, name))

    @property
    def quantized(self) -> QuantizedWeight:
        """The weight as it lies in memory."""
        return QuantizedWeight(self.packed, self.scales, self.zeros, self.bits, self.out_features, self.in_features)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """Packed codes (uint8): peft asks it for the device."""
        return self.quantized.packed

    def forward(self, input: Tensor) -> Tensor:
        """input [..., K] -> [..., N] in the input's dtype."""
        return quantized_linear(input, self.quantized)


class Dropout(nn.Module):
    """Dropout whose mask is a hash of (seed and name, step, place, value): the same when a layer is run again for its
    gradient, on every number of ranks, and after a resume; no generator to save.
    """

    def __init__(self, probability: float, key: int) -> None:
        super().__init__()
        self.probability, self.key, self.step = probability, key, 0

    def forward(self, x: Tensor) -> Tensor:
        """x of any shape, scaled by 1 / (1 - p) where it is kept; unchanged in eval mode."""
        if not self.training or self.probability == 0:
            return x
        bits = x.detach().float().view(torch.int32).to(torch.int64).flatten()
        state = bits + torch.arange(bits.numel(), device=x.device) * 0x9E3779B1 + (self.key + self.step * 0x85EBCA6B)
        for multiplier in (0x7FEB352D, 0x846CA68B):  # lowbias32 (Wellons 2018)
            state = (((state & _MASK32) ^ ((state & _MASK32) >> 16)) * multiplier) & _MASK32
        keep = (state ^ (state >> 15)).view(x.shape) >= int(self.probability * 2**32)
        return x * keep / (1 - self.probability)


def add_adapters(model: Model, config: AdapterConfig, seed: int) -> Model:
    """Freeze `model` and put adapters on its target linears, in place; qlora also quantises those. The one-output head
    of a reward model, which has learned nothing yet, stays trainable as it is.

    B starts at zero, so the model's function does not change (but for the rounding of qlora). Raises ConfigError where
    peft is absent or a target does not exist.
    """
    if config.kind == "none":
        return model
    model.requires_grad_(False)
    wrapped = _targets(model, config.targets)
    if config.kind == "qlora":
        for name, linear in wrapped.items():
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, QuantizedLinear(linear.weight, config.bits))
    _inject(model, config)
    reset_adapters(model, config, seed)
    for name, parameter in model.named_parameters():
        if name == REWARD_HEAD:
            parameter.requires_grad_(True)
    return model


def reset_adapters(model: nn.Module, config: AdapterConfig, seed: int) -> None:
    """A uniform in +-1 / sqrt(K) (as peft draws it, but from the seed and the name), B zero, and own dropout."""
    for name, parameter in adapter_parameters(model):
        if ".lora_B." in name:
            nn.init.zeros_(parameter)
        elif name != REWARD_HEAD and parameter.device.type != "meta":
            draw = torch.Generator().manual_seed(_key(seed, name))
            bound = 1 / math.sqrt(parameter.shape[1])
            with torch.no_grad():
                parameter.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=draw))
    for name, module in _layers(model).items():
        if config.dropout > 0:
            module.lora_dropout["default"] = Dropout(config.dropout, _key(seed, f"dropout {name}"))


def adapter_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The trainable parameters, by the names that engines and checkpoints use."""
    return ((name, p) for name, p in model.named_parameters() if ".lora_" in name or name == REWARD_HEAD)


@contextlib.contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """For a while, the function of the frozen weights alone: what the model was before its adapters were trained."""
    layers = list(_layers(model).values())
    trainable = [parameter for _, parameter in adapter_parameters(model) if parameter.requires_grad]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter in trainable:  # peft makes parameters untrainable with their adapter
            parameter.requires_grad_(True)


def set_dropout_step(model: nn.Module, step: int) -> None:
    """Give each training step masks of its own; call it before the step."""
    for module in model.modules():
        if isinstance(module, Dropout):
            module.step = step


def save_adapter(
    folder: Path,
    config: AdapterConfig,
    model: ModelConfig,
    weights: Iterable[tuple[str, Tensor]],
    *,
    base: str | None = None,
    layout: str = "internlm2",
) -> None:
    """Write adapter_config.json and adapter_model.safetensors as peft reads them.

    weights  (name, tensor) of the adapters: `adapter_parameters(model)`, or an engine's full_weights() in fp32
    base     the folder or name of the model that they belong to, for peft's AutoPeftModel
    layout   internlm2: fused wqkv, for vLLM, LMDeploy and llama.cpp on the official layout; llama: q, k and v apart,
    for
             transformers, where InternLM2 is computed by Llama's classes
    """
    from safetensors.torch import save_file

    given = dict(weights)
    tensors = {name.replace(".default.", "."): tensor for name, tensor in given.items() if ".lora_" in name}
    targets = list(config.targets)
    if layout == "llama":
        tensors = dict(_llama_tensors(tensors, model))
        targets = sorted({name.split(".lora_")[0].rpartition(".")[2] for name in tensors})
    head = {REWARD_HEAD: given[REWARD_HEAD]} if REWARD_HEAD in given else {}
    tensors |= head
    stored = {_PEFT_PREFIX + name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    folder.mkdir(parents=True, exist_ok=True)
    # The function that was trained includes the rounding of the base: whoever merges must know of it.
    metadata = {"format": "pt"} | ({"base_bits": str(config.bits)} if config.kind == "qlora" else {})
    save_file(stored, folder / WEIGHTS_FILE, metadata)
    settings = _lora_config(replace(config, targets=targets), base)
    settings.modules_to_save = [name.removesuffix(".weight") for name in head] or None
    settings.save_pretrained(str(folder))


def load_adapter(model: nn.Module, folder: Path, seed: int = 0) -> AdapterConfig:
    """Put the adapters saved in `folder` on `model`, in place, ready to train on or to generate with."""
    config, tensors = read_adapter(folder)
    add_adapters(model, config, seed)
    parameters = {name.replace(".default.", "."): parameter for name, parameter in adapter_parameters(model)}
    if parameters.keys() != tensors.keys():
        different = sorted(parameters.keys() ^ tensors.keys())[0]
        raise ConfigError(f"{folder / WEIGHTS_FILE} does not fit this model: {different} is on one side only.")
    with torch.no_grad():
        for name, parameter in parameters.items():
            if parameter.shape != tensors[name].shape:
                found, wanted = list(tensors[name].shape), list(parameter.shape)
                raise ConfigError(f"{folder / WEIGHTS_FILE}: {name} has shape {found}, this model needs {wanted}.")
            parameter.copy_(tensors[name])
    return config


def read_adapter(folder: Path) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """Settings and tensors (names without peft's prefix) of an adapter with the official names. Raises ConfigError."""
    from safetensors import SafetensorError, safe_open

    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise ConfigError(f"{folder} is no adapter: it holds no {name}.")
    try:
        settings: dict[str, Any] = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        with safe_open(folder / WEIGHTS_FILE, "pt") as file:
            bits = (file.metadata() or {}).get("base_bits")
            tensors = {name.removeprefix(_PEFT_PREFIX): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (ValueError, SafetensorError) as error:
        raise ConfigError(f"{folder} holds a damaged adapter: {error}") from error
    adapted = {name.split(".lora_")[0].rpartition(".")[2] for name in tensors if name != REWARD_HEAD}
    unknown = sorted(adapted - set(TARGETS))
    if unknown or settings.get("use_dora") or settings.get("use_rslora") or settings.get("bias", "none") != "none":
        what = f"it adapts {', '.join(unknown)}" if unknown else "it uses DoRA, rank-stabilised scaling or biases"
        raise ConfigError(f"{folder}: only plain LoRA on {', '.join(TARGETS)} can be used here, but {what}.")
    config = AdapterConfig(
        kind="lora" if bits is None else "qlora",
        rank=int(settings["r"]),
        alpha=float(settings["lora_alpha"]),
        dropout=float(settings.get("lora_dropout") or 0.0),
        targets=sorted(settings["target_modules"]),
        bits=4 if bits is None else int(bits),
    )
    return config, tensors


def adapted_weights(base: Weights, folder: Path) -> Weights:
    """`base` with the adapter in `folder` merged in, one tensor at a time; ready for `export_weights`.

    After qlora the base is rounded as it was in training, so that the merged model is the trained one.
    """
    config, tensors = read_adapter(folder)
    head = tensors.pop(REWARD_HEAD, None)
    if missing := {name.split(".lora_")[0] + ".weight" for name in tensors} - base.dtypes.keys():
        raise ConfigError(f"{folder} adapts {sorted(missing)[0]}, which {base.origin or 'the model'} does not have.")

    dtypes = dict(base.dtypes)
    if head is not None:  # the adapter of a reward model brings the head
        dtypes.pop(OUTPUT, None)
        dtypes[REWARD_HEAD] = base.dtype

    def read(name: str) -> Tensor:
        if name == REWARD_HEAD and head is not None:
            return head.to(base.dtype)
        weight, module = base.read(name), name.removesuffix(".weight")
        a, b = tensors.get(f"{module}.lora_A.weight"), tensors.get(f"{module}.lora_B.weight")
        if a is None or b is None:
            return weight
        frozen = weight.float()
        if config.kind == "qlora":
            frozen = dequantize_weight(quantize_weight(frozen, config.bits), torch.float32)
        return _merged(frozen, a, b, config).to(weight.dtype)

    return replace(base, kind=f"{base.kind} with {config.kind}", dtypes=dtypes, read=read)


def merged_weights(model: nn.Module, config: AdapterConfig, tokenizer: Path | None = None) -> Weights:
    """The weights of a model with adapters in memory, merged; names and shapes are those of a plain model."""
    layers = _layers(model)
    with torch.device("meta"):
        kind = cast(Callable[[ModelConfig], nn.Module], type(model))
        plain = model_weights(kind(cast(ModelConfig, model.config)), tokenizer)
    parameters = dict(model.named_parameters())

    def read(name: str) -> Tensor:
        layer = layers.get(name.removesuffix(".weight"))
        if layer is None:
            return parameters[name].detach()
        frozen = layer.base_layer
        if isinstance(frozen, QuantizedLinear):
            weight = dequantize_weight(frozen.quantized, torch.float32)
        else:
            weight = frozen.weight.detach().float()
        a, b = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
        return _merged(weight, a, b, config).to(a.dtype)

    dtype = next(parameter.dtype for _, parameter in adapter_parameters(model))
    return replace(plain, dtypes=dict.fromkeys(plain.dtypes, dtype), read=read)


def describe(model: nn.Module, config: AdapterConfig) -> str:
    """One line for the log: what is trained, and what the frozen weights take."""
    trained = sum(parameter.numel() for _, parameter in adapter_parameters(model))
    frozen = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()] if not tensor.requires_grad)
    return (
        f"{config.kind}: {trained:,} trained parameters (rank {config.rank}, alpha {config.alpha:g}, on "
        f"{', '.join(config.targets)}); frozen weights take {frozen / 1e6:,.1f} MB"
    )


def _merged(weight: Tensor, a: Tensor, b: Tensor, config: AdapterConfig) -> Tensor:
    """weight [N, K] float32, A [r, K], B [N, r] -> weight + alpha / rank * B A."""
    device = weight.device
    return weight + config.alpha / config.rank * (b.to(device).float() @ a.to(device).float())


def _targets(model: nn.Module, targets: Iterable[str]) -> dict[str, nn.Linear]:
    wanted = set(targets)
    if not wanted or wanted - set(TARGETS):
        wrong = ", ".join(sorted(wanted - set(TARGETS))) or "nothing"
        raise ConfigError(f"adapter.targets names {wrong}: choose from {', '.join(TARGETS)}.")
    modules = model.named_modules()
    return {name: m for name, m in modules if isinstance(m, nn.Linear) and name.rpartition(".")[2] in wanted}


def _lora_config(config: AdapterConfig, base: str | None = None) -> Any:
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ConfigError(f"adapter={config.kind} needs the package peft: pip install peft") from error
    return LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]
        lora_dropout=config.dropout,
        target_modules=list(config.targets),
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        inference_mode=True,
    )


def _inject(model: nn.Module, config: AdapterConfig) -> None:
    """Let peft replace the targets. Its own dropout stays off (`Dropout` above), and so does its task's wrapper."""
    settings = _lora_config(replace(config, dropout=0.0))
    settings.inference_mode = False
    from peft import inject_adapter_in_model

    with torch.random.fork_rng(devices=[]):  # peft draws A from the global generator; `reset_adapters` draws it again
        inject_adapter_in_model(settings, model)


def _layers(model: nn.Module) -> dict[str, Any]:
    """peft's layers by the name of the linear that they wrap."""
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def _llama_tensors(tensors: dict[str, Tensor], model: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """A and B under Llama's names: q, k and v share wqkv's A and take their rows of its B."""
    for name, tensor in tensors.items():
        module, _, part = name.partition(".lora_")
        targets = [target.removesuffix(".weight") for target in llama_shapes(model, f"{module}.weight")]
        parts: Iterable[Tensor] = [tensor] * len(targets)
        if len(targets) == len(QKV) and part.startswith("B"):
            parts = split_wqkv(tensor, model)
        for target, piece in zip(targets, parts):
            yield f"{target}.lora_{part}", piece


def _key(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed} {name}".encode(), digest_size=6).digest(), "little")
