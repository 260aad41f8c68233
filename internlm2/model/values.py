"""Weights on demand, a piece of a parameter at a time: what an engine over many ranks cuts its shards from.

At 20B the whole model in float32 is 80 GB, and 640 GB on a node of eight ranks that each built it. A rank that asks for
the pieces that it owns holds no more than one parameter beside its shards.
"""

from collections.abc import Callable
from typing import cast

from torch import Tensor, nn

from internlm2.config import ConfigError, ModelConfig
from internlm2.model.initialization import initial_values
from internlm2.model.layouts import OUTPUT, REWARD_HEAD
from internlm2.model.weights import Weights, check_shape

# (parameter, start, stop) -> elements start..stop of it, flattened: float32 [stop - start] on the CPU
Values = Callable[[str, int, int], Tensor]


def random_values(model: nn.Module, config: ModelConfig, seed: int) -> Values:
    """The values that `initialize` would fill `model` with."""
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    return lambda name, start, stop: initial_values(name, sizes[name], config, seed, start, stop)


def stored_values(model: nn.Module, weights: Weights, origin: str, head_seed: int | None = None) -> Values:
    """The values that `load_weights` would fill `model` with, or `load_scalar_weights` where it has a scalar head:
    with `head_seed` that is drawn anew, and the head of the weights stays behind.

    Reads a tensor for each piece that is asked for. ConfigError where a name or a shape does not fit; `origin` is for
    errors.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    # Its sizes are taken now: an engine may cut the parameters up before it asks.
    head = None if head_seed is None else random_values(model, cast(ModelConfig, model.config), head_seed)
    left_out = () if head is None else (OUTPUT, REWARD_HEAD)
    missing = [name for name in shapes if name not in weights.dtypes and (head is None or name != REWARD_HEAD)]
    if missing:
        raise ConfigError(f"{origin} lacks {missing[0]} ({len(missing)} missing in all).")
    unknown = [name for name in weights.dtypes if name not in shapes and name not in left_out]
    if unknown:
        raise ConfigError(f"{origin} holds {unknown[0]}, which this model has no place for.")

    def values(name: str, start: int, stop: int) -> Tensor:
        if head is not None and name == REWARD_HEAD:
            return head(name, start, stop)
        tensor = weights.read(name)
        check_shape(name, tuple(tensor.shape), shapes[name], origin)
        return tensor.reshape(-1)[start:stop].float()

    return values
