"""Products with quantized weights, adapters and losses as they are measured: our call, the same from other code, and peers."""

from __future__ import annotations

import importlib.util
import math
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.bench.kernel_sides import Run, Setting, Sides
from vlmbuild.ops.cross_entropy.triton import cross_entropy_triton
from vlmbuild.ops.linear_4bit.op import dequantize_4bit
from vlmbuild.ops.linear_4bit.triton import dequantize_4bit_triton, grad_input_triton, linear_4bit_triton
from vlmbuild.ops.linear_8bit.op import dequantize_8bit
from vlmbuild.ops.linear_8bit.triton import grad_input_8bit_triton, linear_8bit_triton
from vlmbuild.ops.lora.op import lora_reference
from vlmbuild.ops.lora.triton import lora_backward_triton, lora_triton
from vlmbuild.runtime.torch.loss import summed_cross_entropy

THRESHOLD = 6.0
"""Of LLM.int8()'s outliers."""


def linear_4bit(setting: Setting, rows: int, wide: int, narrow: int) -> dict[str, Sides]:
    """NF4 with double quantization, by bitsandbytes."""
    from bitsandbytes import functional, matmul_4bit

    dense = setting.draw(wide, narrow) / math.sqrt(narrow)
    packed, state = functional.quantize_4bit(dense, blocksize=64, quant_type="nf4", compress_statistics=True)
    buffers = (packed, state.absmax, state.state2.absmax, state.offset)
    geometry = (narrow, wide, 64, "nf4", setting.dtype)
    weight = dequantize_4bit(*buffers, *geometry)
    x, grad = setting.draw(rows, narrow), setting.draw(rows, wide)
    forward, backward = (lambda: F.linear(x, weight)), (lambda: grad @ weight)
    return {
        "forward": Sides(
            lambda: linear_4bit_triton(x, buffers, None, geometry),
            forward,
            {"bitsandbytes": lambda: matmul_4bit(x, packed.t(), state), "16-bit weight": forward},
        ),
        "input gradient": Sides(
            lambda: grad_input_triton(grad, buffers, geometry),
            backward,
            {
                "dequantize, then multiply": lambda: grad @ dequantize_4bit_triton(buffers, geometry),
                "16-bit weight": backward,
            },
        ),
    }


def linear_8bit(setting: Setting, rows: int, wide: int, narrow: int) -> dict[str, Sides]:
    """LLM.int8() on an input with outliers in every thousandth column."""
    from bitsandbytes import MatmulLtState, matmul

    values = setting.draw(wide, narrow, dtype=torch.float32) / math.sqrt(narrow)
    scales = values.abs().amax(1)
    weight = torch.round(values * (127 / scales)[:, None]).to(torch.int8)
    x, grad = setting.draw(rows, narrow), setting.draw(rows, wide)
    x[0, ::1000] = 20.0
    dense = dequantize_8bit(weight, scales, setting.dtype)
    forward, backward = (lambda: F.linear(x, dense)), (lambda: grad @ dense)
    state = MatmulLtState()
    state.CB, state.SCB, state.threshold, state.has_fp16_weights = weight, scales, THRESHOLD, False
    return {
        "forward": Sides(
            lambda: linear_8bit_triton(x, weight, scales, None, THRESHOLD),
            forward,
            {"bitsandbytes": lambda: matmul(x, weight, state=state, threshold=THRESHOLD), "16-bit weight": forward},
        ),
        "input gradient": Sides(
            lambda: grad_input_8bit_triton(grad, weight, scales),
            backward,
            {
                "dequantize, then multiply": lambda: grad @ dequantize_8bit(weight, scales, setting.dtype),
                "16-bit weight": backward,
            },
        ),
    }


def lora(setting: Setting, rows: int, wide: int, narrow: int, rank: int) -> dict[str, Sides]:
    """An adapter on a layer's result, and its gradients."""
    base, x, grad = (setting.draw(rows, size) for size in (wide, narrow, wide))
    down, up = (setting.draw(*shape, dtype=torch.float32) / 60 for shape in ((rank, narrow), (wide, rank)))
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (base, x, down, up)]
    plain = lambda: lora_reference(*leaves, 0.5)  # noqa: E731
    peers = {"torch": plain, "torch compiled": setting.compiled(plain)}

    def gradients(call: Run) -> Run:
        result = cache(call)
        return lambda: torch.autograd.grad(result(), leaves[1:], grad, retain_graph=True)

    return {
        "forward": Sides(lambda: lora_triton(base, x, down, up, 0.5), plain, peers),
        "gradients": Sides(
            lambda: lora_backward_triton(grad, x, down, up, 0.5),
            gradients(plain),
            {name: gradients(call) for name, call in peers.items()},
        ),
    }


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
