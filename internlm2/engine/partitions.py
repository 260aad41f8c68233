"""Where DeepSpeed's flat partitions hold which piece of which parameter: what makes its state our checkpoint format.

ZeRO 1 and 2 concatenate the parameters of an optimizer group and cut the whole into one partition a rank, so a rank
owns some parameters and pieces of two more. ZeRO 3 cuts every parameter by itself. Either way this rank's fp32 weights
and moments are flat tensors, into which the fragments are views.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from internlm2.engine.base import Fragment


class Partitions:
    """The live optimizer state of one DeepSpeed engine. `names`: of the trained parameters, by identity."""

    def __init__(self, optimizer: Any, stage: int, names: Mapping[int, str], shapes: Mapping[str, tuple[int, ...]]):
        self.optimizer, self.stage = optimizer, stage
        self.names, self.shapes = names, shapes
        self._make_moments()

    @property
    def flat_weights(self) -> list[torch.Tensor]:
        """This rank's fp32 weights, one tensor a group."""
        if self.stage == 3:
            return list(self.optimizer.fp32_partitioned_groups_flat)
        if self._is_bf16_optimizer:
            return list(self.optimizer.fp32_groups_flat_partition)
        return list(self.optimizer.single_partition_of_fp32_groups)

    @property
    def _is_bf16_optimizer(self) -> bool:
        """DeepSpeed has an optimizer of its own for ZeRO 1 with bf16 weights and fp32 gradient sums on the device."""
        return hasattr(self.optimizer, "bf16_groups")

    @torch.no_grad()
    def add_up_gradients(self, across: Any) -> None:
        """Sum the reduced gradient over the process group `across`, whose ranks own the same shards.

        Only this rank's shard is sent, except by the bf16 optimizer, which takes the norm of the whole gradient.
        """
        optimizer = self.optimizer
        if self._is_bf16_optimizer:
            reduced = optimizer.fp32_groups_gradients_flat
        elif optimizer.cpu_offload:
            reduced = [flat.grad for flat in self.flat_weights]
        else:
            reduced = [tensor for tensors in optimizer.averaged_gradients.values() for tensor in tensors or ()]
        for gradient in reduced:
            dist.all_reduce(gradient, group=across)
        if not self._is_bf16_optimizer and optimizer.cpu_offload:
            self._measure_again()

    def _measure_again(self) -> None:
        """With offloading DeepSpeed noted each parameter's gradient norm before the sum was complete."""
        optimizer = self.optimizer
        for parameters in optimizer.params_in_partition:
            for number in map(optimizer.get_param_id, parameters):
                group, _, start, length = optimizer.grad_position[number]
                piece = self.flat_weights[group].grad.view(-1).narrow(0, start, length)
                optimizer.norm_for_param_grads[number] = piece.norm(2)

    @property
    def states(self) -> list[dict[str, Any]]:
        """AdamW's state of each flat tensor."""
        return [self.optimizer.optimizer.state[flat] for flat in self.flat_weights]

    def fragments(self, kinds: Sequence[str]) -> Iterator[Fragment]:
        """Every piece that this rank owns, without the padding at a partition's end."""
        pieces = self._pieces_of_parameters() if self.stage == 3 else self._pieces_of_groups()
        flats, states = self.flat_weights, self.states
        for name, offset, group, start, length in pieces:
            for kind in kinds:
                flat = flats[group] if kind == "weight" else states[group][kind]
                view = flat.detach().view(-1)[start : start + length]
                yield Fragment(name, kind, offset, self.shapes[name], view)

    @torch.no_grad()
    def spread(self) -> None:
        """Bring the model's weights, on all ranks, in line with the fp32 ones. Collective."""
        optimizer = self.optimizer
        if self.stage < 3:
            optimizer.update_lp_params()
            return
        kept = optimizer.persistent_parameters
        if kept:
            kept[0].partition(kept)
        for number, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
            optimizer.fp16_partitioned_groups_flat[number].data.copy_(flat.data)
            optimizer._unflatten_partitioned_parameters(number)
        if optimizer.zero_hpz_partition_size > 1:
            optimizer.invalidate_secondary_tensor()  # the copies inside a node, which the forward pass would gather
        if kept:
            kept[0].all_gather(kept)

    def _pieces_of_groups(self) -> Iterator[tuple[str, int, int, int, int]]:
        """(name, offset in the parameter, group, start in its flat tensor, length) of ZeRO 1 and 2."""
        groups = self.optimizer.bf16_groups if self._is_bf16_optimizer else self.optimizer.bit16_groups
        for group, parameters in enumerate(groups):
            for parameter in parameters:
                mapping = parameter._hp_mapping
                if mapping is not None:
                    there = mapping.hp_fragment_address
                    yield (
                        self.names[id(parameter)],
                        mapping.lp_fragment_address.start,
                        group,
                        there.start,
                        there.numel,
                    )

    def _pieces_of_parameters(self) -> Iterator[tuple[str, int, int, int, int]]:
        """As above, of ZeRO 3, whose last rank's piece of a parameter may hold padding, or nothing else."""
        optimizer = self.optimizer
        for parameters in optimizer.fp16_groups:
            for parameter in parameters:
                group, start, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
                offset = optimizer._get_param_partition_rank(parameter) * length
                valid = min(length, parameter.ds_numel - offset)
                if valid > 0:
                    yield self.names[id(parameter)], offset, group, start, valid

    def _make_moments(self) -> None:
        """AdamW makes its state in the first step; a checkpoint is loaded before that."""
        for flat in self.flat_weights:
            self.optimizer.optimizer.state[flat] = {
                "step": torch.zeros((), dtype=torch.float32, device=flat.device),
                "exp_avg": torch.zeros_like(flat),
                "exp_avg_sq": torch.zeros_like(flat),
            }
