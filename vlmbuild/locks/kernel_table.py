"""What Triton makes of a program's kernels, for GPUs that are not there: registers, spills, shared memory, tensor cores."""

from __future__ import annotations

import re
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vlmbuild.cores import available_cores
from vlmbuild.locks.document import Kernels, LockedKernel
from vlmbuild.locks.kernel_launches import launches
from vlmbuild.program import Program

if TYPE_CHECKING:
    from vlmbuild.ops._triton import Launch

TARGETS = (80, 90, 100)
"""Compute capabilities: A100, H100, B200."""

_TENSOR_CORE = {"tcgen05": r"tcgen05\.mma", "wgmma": r"wgmma\.mma_async", "mma": r"\bmma\.sync"}
_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg")
_POINTERS = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int64: "*i64", torch.int32: "*i32",
    torch.uint8: "*u8", torch.int8: "*i8", torch.bool: "*i1",
}  # fmt: skip
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)")
_ALIGNMENT = 16

Row = dict[str, Any]
_compiled: dict[tuple[Any, ...], Row] = {}


def kernel_table(program: Program, dtype: torch.dtype) -> Kernels:
    """Compile every kernel that a finished program launches, in each configuration, for every target.

    Args:
        program: With shapes.
        dtype: The compute dtype.

    Returns:
        The table, or why there is none: Triton is not installed (it is Linux only), or interprets kernels.
    """
    try:
        from vlmbuild.ops._triton import INTERPRET
    except ModuleNotFoundError:
        return Kernels("triton is not installed")
    if INTERPRET:
        return Kernels("TRITON_INTERPRET is set, and interpreted kernels are not compiled")
    labels: dict[tuple[Any, ...], str] = {}
    regions: dict[str, dict[str, None]] = {}
    chosen: dict[str, Launch] = {}
    for region, launch in launches(program, dtype):
        key = _key(launch)
        if key not in labels:
            labels[key] = _label(launch, chosen)
            chosen[labels[key]] = launch
        regions.setdefault(labels[key], {})[region] = None
    rows = _compile_all(
        {(*key, target): (chosen[label], target) for key, label in labels.items() for target in TARGETS}
    )
    keys = {label: key for key, label in labels.items()}
    return Kernels(
        table={
            label: LockedKernel(
                tuple(regions[label]), {f"sm_{target}": rows[*keys[label], target] for target in TARGETS}
            )
            for label in sorted(keys)
        }
    )


def _compile_all(wanted: dict[tuple[Any, ...], tuple[Launch, int]]) -> dict[tuple[Any, ...], Row]:
    """Compile what this process has not compiled yet, on all cores: recipes and models share most of their kernels."""
    import triton  # type: ignore[import-untyped]

    missing = {key: task for key, task in wanted.items() if key not in _compiled}
    with triton.knobs.compilation.scope(), ThreadPoolExecutor(available_cores()) as pool:
        triton.knobs.compilation.disable_line_info = True  # it names files, and sizes must not depend on where they lie
        _compiled.update(zip(missing, pool.map(lambda task: compile_launch(*task), missing.values()), strict=True))
    return {key: _compiled[key] for key in wanted}


def _label(launch: Launch, taken: dict[str, Any]) -> str:
    """ "forward_kernel bf16 GQA=6 DIM=128 ... 8 warps"; a number tells apart what differs in strides only."""
    dtype = _POINTERS[launch.arguments[0].dtype].removeprefix("*")
    parts = [launch.kernel.__name__.strip("_"), dtype]
    for name, value in launch.constants.items():
        if isinstance(value, bool) and name not in _OPTIONS:
            parts += [name] if value else []
        elif name not in _OPTIONS:
            parts.append(f"{name}={value}")
    parts.append(f"{launch.constants['num_warps']} warps")
    label = " ".join(parts)
    same = sum(other == label or other.startswith(f"{label} #") for other in taken)
    return f"{label} #{same + 1}" if same else label


def _key(launch: Launch) -> tuple[Any, ...]:
    """What decides the machine code: the kernel's source, its constants, and what is known of each argument."""
    return (launch.kernel.cache_key, *map(_specialized, launch.arguments), *sorted(launch.constants.items()))


def _specialized(argument: Any) -> str:
    """Type of an argument, and what Triton's launcher compiles a kernel for: integers that are 1 or multiples of 16."""
    if isinstance(argument, torch.Tensor):
        return _POINTERS[argument.dtype]
    if isinstance(argument, float):
        return "fp32"
    if argument == 1:
        return "1"
    kind = "i32" if argument < 2**31 else "i64"
    return f"{kind} aligned" if argument % _ALIGNMENT == 0 else kind


def compile_launch(launch: Launch, target: int) -> Row:
    """Compile a launch's kernel ahead of time.

    Args:
        launch: Its tensors need no data.
        target: Compute capability, 90 for sm_90.
    """
    import triton
    from triton.backends.compiler import GPUTarget  # type: ignore[import-untyped]

    source = triton.compiler.ASTSource(launch.kernel, *_signature(launch))
    options = {name: value for name, value in launch.constants.items() if name in _OPTIONS}
    compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    registers, spilled = _usage(compiled.asm["cubin"])
    ptx = compiled.asm["ptx"]
    units = [name for name, pattern in _TENSOR_CORE.items() if re.search(pattern, ptx)]
    return {
        "registers": registers,
        "spilled": spilled,
        "shared": compiled.metadata.shared,
        "tensor_core": units[0] if units else "none",
        "cubin": len(compiled.asm["cubin"]),
    }


def _signature(launch: Launch) -> tuple[dict[str, str], dict[tuple[int, ...], Any], dict[tuple[int, ...], Any]]:
    """Types of all parameters, values of the constant ones, and alignment: as Triton's launcher has them."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for place, name in enumerate(launch.kernel.arg_names):
        if place >= len(launch.arguments):
            signature[name], constants[place,] = "constexpr", launch.constants[name]
            continue
        known = _specialized(launch.arguments[place])
        if known == "1":
            signature[name], constants[place,] = "constexpr", 1
            continue
        signature[name] = known.removesuffix(" aligned")
        if known.startswith("*") or known.endswith(" aligned"):
            attributes[place,] = [["tt.divisibility", _ALIGNMENT]]
    return signature, constants, attributes


def _usage(cubin: bytes) -> tuple[int, int]:
    """(registers of a thread, bytes that it spills to local memory), as NVIDIA's tool in Triton's wheel reads them."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        command = [_cuobjdump(), "-res-usage", str(file)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603  (of Triton's own wheel)
    registers, stack, local = map(int, _USAGE.findall(done.stdout)[0])
    return registers, stack + local


@cache
def _cuobjdump() -> str:
    import triton

    return str(triton.knobs.nvidia.cuobjdump.path)
