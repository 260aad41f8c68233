"""A backbone with one number for each position: the reward model and the critic of PPO (report 4.2).

The report replaces the output layer of an SFT model by a randomly initialised linear map to one number (report 4.2.1).
The reward model's score of a sequence is the number at its last token, the appended `<|reward|>`; the critic's values
are the numbers at all positions. T tokens of n packed sequences, C hidden size.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from internlm2.config import ConfigError, ModelConfig
from internlm2.model.initialization import initialize, new_model
from internlm2.model.layouts import OUTPUT, REWARD_HEAD
from internlm2.model.transformer import InternLM2
from internlm2.model.weights import Weights, load_weights, open_weights
from internlm2.ops import Linear


class ScalarHead(Linear):
    """Hidden states [T, C] -> [T] in float32: bfloat16 has steps of 1/32 between 4 and 8, where scores end."""

    def __init__(self, config: ModelConfig):
        super().__init__(config.hidden_size, 1, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        return F.linear(hidden.to(wide), self.weight.to(wide)).squeeze(-1)


class ScalarModel(nn.Module):
    """Backbone `model` as in CausalLM, and `v_head`, the names of the released reward models."""

    def __init__(self, config: ModelConfig, *, attention: str = "auto", recompute: str = "none"):
        super().__init__()
        self.config = config
        self.model = InternLM2(config, attention=attention, recompute=recompute)
        self.v_head = ScalarHead(config)

    @classmethod
    def from_config(
        cls,
        config: ModelConfig,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        attention: str = "auto",
        recompute: str = "none",
        seed: int | None = 0,
    ) -> "ScalarModel":
        """A new model; see `new_model`."""
        return new_model(
            lambda: cls(config, attention=attention, recompute=recompute),
            config,
            device=device,
            dtype=dtype,
            seed=seed,
        )

    def forward(
        self, ids: Tensor, cu_seqlens: Tensor, max_seqlen: int | None = None, at: Tensor | None = None
    ) -> Tensor:
        """ids [T] int64, cu_seqlens [n + 1] int32 -> one number for each position, [T] float32 (float64 stays); with
        `at` [A] int64 for these positions only, [A].
        """
        ranks = self.model.sequence_parallel
        if ranks is None:
            return self.v_head(self.model(ids, cu_seqlens, max_seqlen, at))
        values = ranks.gather(self.v_head(self.model(ids, cu_seqlens, max_seqlen)), len(ids))
        return values if at is None else values[at]

    def scores(self, ids: Tensor, cu_seqlens: Tensor, max_seqlen: int | None = None) -> Tensor:
        """The number at the last token of each sequence, [n] float32. Its place comes from the lengths alone."""
        return self(ids, cu_seqlens, max_seqlen, last_positions(cu_seqlens))


def last_positions(cu_seqlens: Tensor) -> Tensor:
    """[n + 1] int32 -> [n] int64: where the last token of each sequence stands, and with it a reward model's score."""
    return cu_seqlens[1:].long() - 1


def load_scalar_model(
    path: str | Path,
    *,
    head_seed: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    attention: str = "auto",
    recompute: str = "none",
) -> ScalarModel:
    """A ScalarModel with the weights at `path` (sources as `open_weights`), in their stored dtype unless one is given.

    head_seed  None: the head comes with the weights, which then must be those of a reward model. Else a new head is
               drawn from this seed, and the weights may be of a language model or of a reward model, whose output
               matrix or head stays behind.
    """
    weights = open_weights(path)
    model = ScalarModel.from_config(
        weights.config,
        device=device,
        dtype=dtype or weights.dtype,
        attention=attention,
        recompute=recompute,
        seed=None,
    )
    load_scalar_weights(model, weights, str(path), head_seed)
    return model


def load_scalar_weights(model: ScalarModel, weights: Weights, origin: str, head_seed: int | None = None) -> None:
    """Fill `model` from `weights`; `head_seed` as in `load_scalar_model`. `origin` is for errors."""
    if head_seed is None:
        if REWARD_HEAD not in weights.dtypes:
            raise ConfigError(f"{origin} holds no {REWARD_HEAD}: it is a language model, not a reward model.")
        load_weights(model, weights, origin)
        return
    backbone = ((name, weights.read(name)) for name in weights.dtypes if name not in (OUTPUT, REWARD_HEAD))
    load_weights(model.model, ((name.removeprefix("model."), tensor) for name, tensor in backbone), origin)
    initialize(model.v_head, model.config, head_seed, prefix="v_head.")
