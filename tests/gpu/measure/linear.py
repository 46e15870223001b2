"""NF4 and int8 linear layers: our operators beside bitsandbytes' layers and a 16-bit weight."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.gpu.measure.record import Record, Run, Setting, compare

OUT, IN = 18944, 3584
ROWS = (1, 16, 512, 4096)
THRESHOLD = 6.0
"""Outliers of LLM.int8()."""
LIMITS = {"nf4": 2e-2, "int8": 5e-2}
"""Relative error against the dequantized weight; int8 rounds inputs to eight bits as well."""


def run(record: Record, setting: Setting) -> None:
    """Time products and input gradients of both formats."""
    for form, make in (("nf4", _nf4), ("int8", _int8)):
        for rows in (1, 5) if setting.small else ROWS:
            for part in ("forward", "input gradient"):
                out, wide = (64, 128) if setting.small else (OUT, IN)
                with record.row(f"{form} {part}: {rows} rows of {out} x {wide}") as row:
                    ours, peer, dense = make(setting, out, wide)
                    x = setting.draw(rows, wide).requires_grad_()
                    grad = setting.draw(rows, out)
                    calls = {"bitsandbytes": peer, "16-bit weight": lambda x, dense=dense: F.linear(x, dense)}
                    turn = _forward if part == "forward" else _backward
                    exact = F.linear(x.float(), dense.float()) if part == "forward" else grad.float() @ dense.float()
                    runs = {name: turn(call, x, grad) for name, call in calls.items()}
                    compare(setting, row, turn(ours, x, grad), lambda exact=exact: exact, runs, LIMITS[form])


def _forward(call: Callable[[Tensor], Tensor], x: Tensor, _grad: Tensor) -> Run:
    return torch.no_grad()(lambda: call(x.detach()))


def _backward(call: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> Run:
    kept: list[Tensor] = []

    def run() -> Any:
        if not kept:  # at the first call: a peer may not run here
            kept.append(call(x))
        return torch.autograd.grad(kept[0], x, grad, retain_graph=True)

    return run


def _nf4(setting: Setting, out: int, wide: int) -> tuple[Any, Any, Tensor]:
    import bitsandbytes

    import vlmbuild.ops  # noqa: F401  (registers the operators)

    layer = bitsandbytes.nn.Linear4bit(wide, out, bias=False, compute_dtype=setting.dtype, quant_type="nf4")
    weight = (setting.draw(out, wide) / math.sqrt(wide)).contiguous()
    layer.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", blocksize=64, module=layer)
    layer = layer.to(setting.device)
    packed, state = layer.weight.data, layer.weight.quant_state
    buffers = (packed, state.absmax, state.state2.absmax, state.offset, None, wide, out, 64, "nf4", setting.dtype)
    dense = bitsandbytes.functional.dequantize_4bit(packed, state)
    return lambda x: torch.ops.vlmbuild.linear_4bit(x, *buffers), layer, dense


def _int8(setting: Setting, out: int, wide: int) -> tuple[Any, Any, Tensor]:
    import bitsandbytes

    import vlmbuild.ops  # noqa: F401

    layer = bitsandbytes.nn.Linear8bitLt(wide, out, bias=False, has_fp16_weights=False, threshold=THRESHOLD)
    values = setting.draw(out, wide, dtype=torch.float32) / math.sqrt(wide)
    layer.weight = bitsandbytes.nn.Int8Params(values.half(), requires_grad=False, has_fp16_weights=False)
    layer = layer.to(setting.device).eval()
    scales = values.half().float().abs().amax(1)
    weight = torch.round(values.half().float() * (127 / scales)[:, None]).to(torch.int8)
    dense = (weight.float() * (scales / 127)[:, None]).to(setting.dtype)
    return lambda x: torch.ops.vlmbuild.linear_8bit(x, weight, scales, None, THRESHOLD), layer, dense
