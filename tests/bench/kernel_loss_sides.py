"""Losses as they are measured: our call, the same from other code, and peers."""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.bench.kernel_sides import Run, Setting, Sides
from vlmbuild.ops.cross_entropy.triton import cross_entropy_triton
from vlmbuild.runtime.torch.loss import summed_cross_entropy


def cross_entropy(setting: Setting, rows: int, vocabulary: int) -> Sides:
    """Of logits that are there: losses and their gradient."""
    logits = setting.draw(rows, vocabulary).requires_grad_()
    targets = torch.randint(vocabulary, (rows,), device=setting.device)

    def plain() -> tuple[Tensor, Tensor]:
        loss = F.cross_entropy(logits.float(), targets, reduction="none")
        return loss.detach(), torch.autograd.grad(loss.sum(), logits)[0]

    return Sides(lambda: cross_entropy_triton(logits.detach(), targets, with_gradient=True), plain, {"torch": plain})


def linear_cross_entropy(setting: Setting, rows: int, width: int, vocabulary: int) -> Sides:
    """Loss of a head and its gradients for states and weight, as training has it."""
    states = setting.draw(rows, width).requires_grad_()
    weight = (setting.draw(vocabulary, width) / math.sqrt(width)).requires_grad_()
    targets = torch.randint(vocabulary, (rows,), device=setting.device)

    def with_gradients(loss: Tensor) -> tuple[Tensor, ...]:
        return (loss.detach(), *torch.autograd.grad(loss, (states, weight)))

    def head(tensors: tuple[Tensor, ...], inputs: Tensor) -> Tensor:
        return F.linear(inputs, tensors[0])

    def ours() -> Any:
        return with_gradients(summed_cross_entropy(head, (weight,), states, targets, vocabulary))

    def plain() -> Any:
        return with_gradients(F.cross_entropy(F.linear(states, weight).float(), targets, reduction="sum"))

    peers: dict[str, Run] = {"transformers": plain}  # what its ForCausalLMLoss does
    if importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss(reduction="sum")
        peers["liger"] = lambda: with_gradients(liger(weight, states, targets))
    return Sides(ours, plain, peers)
