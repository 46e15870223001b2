"""Sharding of parameters over several processes: FSDP2 by region instance."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from vlmbuild.errors import BatchError, UsageError
from vlmbuild.runtime.torch.region import RegionInstance


def shard(model: nn.Module, mesh: DeviceMesh | None = None, **options: Any) -> None:
    """Shard a model in place with PyTorch's FSDP2: a repeated block is gathered when it runs, the rest for the whole step.

    Quantized weights and their scales are sharded too, as parameters without gradient. If `mp_policy` has a `param_dtype`,
    each process holds all float32 scales. Call it after `add_lora` or `load_adapter`, and before creating the optimizer.

    Args:
        model: Model from `vlmbuild.load`, not wrapped, nor compiled by `torch.compile(model)`; `model.compile()` may follow.
        mesh: Processes to shard over; None is all.
        **options: Options of `torch.distributed.fsdp.fully_shard`, for example `mp_policy` or `offload_policy`.

    Raises:
        UsageError: There is no process group, the model is sharded already, or it is not from vlmbuild.
    """
    blocks = [module for module in model.modules() if isinstance(module, RegionInstance)]
    if not blocks or isinstance(model, RegionInstance):
        kind = type(model).__name__
        raise UsageError(
            f"Expected a model from vlmbuild.load that is not wrapped, got {kind}. Shard it before wrapping it."
        )
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        raise UsageError("The model is sharded already; call vlmbuild.shard once, and not under accelerate's FSDP.")
    if not torch.distributed.is_initialized():
        raise UsageError(
            "There is no process group to shard over. Start with torchrun or accelerate launch, and call "
            "torch.distributed.init_process_group() first."
        )
    policy = options.get("mp_policy")
    for module in model.modules():
        _frozen_parameters(module, floating=policy is None or policy.param_dtype is None)
    for block in blocks:
        fully_shard(block, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)


def _frozen_parameters(module: nn.Module, floating: bool) -> None:
    """Turn stored buffers into parameters without gradient, since FSDP2 shards nothing else. Scalars cannot be sharded.

    Args:
        floating: Include float32 scales, which FSDP2's mixed precision would cast.
    """
    for name, tensor in list(module._buffers.items()):  # in order, which must be the same in all processes
        if tensor is None or not tensor.ndim or name in module._non_persistent_buffers_set:
            continue
        if floating or not tensor.is_floating_point():
            del module._buffers[name]
            module.register_parameter(name, nn.Parameter(tensor, requires_grad=False))


def check_same_variant(model: nn.Module, variant: str) -> None:
    """Check that all processes of a sharded model gather the same blocks; otherwise they would wait for each other forever.

    Raises:
        BatchError: Only some processes have images in their batch. All processes raise it.
    """
    if not isinstance(model, FSDPModule):
        return
    variants: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(variants, variant)
    if len(set(variants)) > 1:
        ranks = {kind: [rank for rank, other in enumerate(variants) if other == kind] for kind in sorted(set(variants))}
        raise BatchError(
            f"The processes of a sharded model have different kinds of batches (kind: ranks): {ranks}. All must gather the "
            "same blocks: give each batch a sample with an image, or train with DDP, where any mixture works."
        )


def gather_unreached(model: nn.Module) -> None:
    """Gather sharded modules that are never called themselves. FSDP gathers a module when it is called; accelerate shards the
    embeddings, the last norm and the head separately, but here the whole model's graph reads their weights."""
    if isinstance(model, FSDPModule):
        for module in model.modules():
            if isinstance(module, FSDPModule) and module is not model and not isinstance(module, RegionInstance):
                module.unshard()
