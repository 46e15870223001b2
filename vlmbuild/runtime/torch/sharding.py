"""Parameters over several processes: FSDP2 by region instance."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from vlmbuild.errors import BatchError, UsageError
from vlmbuild.runtime.torch.region_instance import RegionInstance


def shard(model: nn.Module, mesh: DeviceMesh | None = None, **options: Any) -> None:
    """Shard a model in place with PyTorch's FSDP2: every repeated block is gathered when it runs, the rest for the whole step.

    Quantized weights and their scales are sharded too, as parameters that take no gradient; float32 scales are not where
    `mp_policy` has a `param_dtype`, and each process holds them whole. Call it after
    `add_lora` or `load_adapter`, and before the optimizer is made.

    Args:
        model: From `vlmbuild.load`, neither wrapped nor compiled by `torch.compile(model)`; `model.compile()` may come after.
        mesh: Which processes hold a part each; None is all.
        **options: Of `torch.distributed.fsdp.fully_shard`, for example `mp_policy` or `offload_policy`.

    Raises:
        UsageError: There are no processes to shard over, the model is sharded already, or it is not vlmbuild's.
    """
    blocks = [module for module in model.modules() if isinstance(module, RegionInstance)]
    if not blocks or isinstance(model, RegionInstance):
        raise UsageError(f"Expected a model from vlmbuild.load that is not wrapped, got {type(model).__name__}.")
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
    """Stored buffers as parameters that take no gradient, since FSDP2 shards nothing else. A scalar cannot be sharded.

    Args:
        floating: Float32 scales too. FSDP2's mixed precision would cast them.
    """
    for name, tensor in list(module._buffers.items()):  # in order, which must be the same in all processes
        if tensor is None or not tensor.ndim or name in module._non_persistent_buffers_set:
            continue
        if floating or not tensor.is_floating_point():
            del module._buffers[name]
            module.register_parameter(name, nn.Parameter(tensor, requires_grad=False))


def check_same_variant(model: nn.Module, variant: str) -> None:
    """Of a sharded model, all processes must gather the same blocks, or they would wait for each other for ever.

    Raises:
        BatchError: Some processes have images in their batch and others do not; on all of them.
    """
    if not isinstance(model, FSDPModule):
        return
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, variant)
    if len(set(found)) > 1:
        ranks = {kind: [rank for rank, other in enumerate(found) if other == kind] for kind in sorted(set(found))}
        raise BatchError(
            f"The processes of a sharded model have different kinds of batches (kind: ranks): {ranks}. All must gather the "
            "same blocks: give each batch a sample with an image, or train with DDP, where any mixture works."
        )


def gather_unreached(model: nn.Module) -> None:
    """Gather the parts that no call of their own reaches. FSDP gathers a module when it is called; accelerate shards the
    embeddings, the last norm and the head as modules of their own, but here the whole model's graph reads their weights."""
    if isinstance(model, FSDPModule):
        for module in model.modules():
            if isinstance(module, FSDPModule) and module is not model and not isinstance(module, RegionInstance):
                module.unshard()
