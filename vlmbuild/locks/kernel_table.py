"""What Triton makes of a program's kernels, for GPUs that are not there: registers, spills, shared memory, tensor cores."""

from __future__ import annotations

import os
import random
import re
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vlmbuild.ir.program import Program
from vlmbuild.locks.document import Kernels, LockedKernel
from vlmbuild.locks.kernel_launches import launches
from vlmbuild.util.cpu import available_cores

if TYPE_CHECKING:
    from vlmbuild.ops.triton_util import Launch

TARGETS = (80, 90, 100)
"""Compute capabilities: A100, H100, B200."""

_TENSOR_CORE = {"tcgen05": r"tcgen05\.mma", "wgmma": r"wgmma\.mma_async", "mma": r"\bmma\.sync"}
_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg")
_POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.bool: "*i1",
}
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)")
_FRONT_END = threading.Lock()
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
        from vlmbuild.ops.triton_util import INTERPRET
    except ModuleNotFoundError:
        return Kernels("triton is not installed")
    if INTERPRET:
        return Kernels("TRITON_INTERPRET is set, and interpreted kernels are not compiled")
    labels: dict[tuple[Any, ...], str] = {}
    regions: dict[str, dict[str, None]] = {}
    chosen: dict[tuple[str, int], Launch] = {}
    for region, target, launch in launches(program, dtype, TARGETS):
        meaning = _meaning(launch)
        label = labels.setdefault(meaning, _label(launch, labels.values()))
        regions.setdefault(label, {})[region] = None
        chosen.setdefault((label, target), launch)
    rows = _compile_all({place: (launch, place[1]) for place, launch in chosen.items()})
    return Kernels(
        table={
            label: LockedKernel(tuple(regions[label]), {f"sm_{target}": rows[label, target] for target in TARGETS})
            for label in sorted(regions)
        }
    )


def _compile_all(wanted: dict[tuple[str, int], tuple[Launch, int]]) -> dict[tuple[str, int], Row]:
    """Compile what this process has not compiled yet, on all cores: recipes and models share most of their kernels.

    Processes that check other models at the same time want many of them, too. Each takes them in an order of its own, so that
    it finds in Triton's disk cache what another has compiled, and does not do the same beside it.
    """
    import triton  # type: ignore[import-untyped]

    keys = {place: _key(*task) for place, task in wanted.items()}
    order = random.Random(os.getpid()).sample(list(wanted), len(wanted))  # noqa: S311
    missing = {keys[place]: wanted[place] for place in order if keys[place] not in _compiled}
    with triton.knobs.compilation.scope(), ThreadPoolExecutor(available_cores()) as pool:
        triton.knobs.compilation.disable_line_info = True  # it names files, and sizes must not depend on where they lie
        _compiled.update(zip(missing, pool.map(lambda task: compile_launch(*task), missing.values()), strict=True))
    return {place: _compiled[key] for place, key in keys.items()}


def _label(launch: Launch, taken: Iterable[str]) -> str:
    """ "forward_kernel bf16 GQA=6 DIM=128 ... CAUSAL"; a number tells apart what differs in strides only."""
    dtype = _POINTERS[launch.arguments[0].dtype].removeprefix("*")
    parts = [launch.kernel.__name__.strip("_"), dtype]
    for name, value in launch.constants.items():
        if isinstance(value, bool):
            parts += [name] if value and name not in _OPTIONS else []
        elif name not in _OPTIONS:
            parts.append(f"{name}={value}")
    label = " ".join(parts)
    same = sum(other == label or other.startswith(f"{label} #") for other in taken)
    return f"{label} #{same + 1}" if same else label


def _meaning(launch: Launch) -> tuple[Any, ...]:
    """What decides the machine code, but for the tile: the kernel's source, its constants, and what is known of each
    argument."""
    known = map(_specialized, launch.arguments, _may_specialize(launch))
    return (launch.kernel.cache_key, *known, *sorted(launch.constants.items()))


def _key(launch: Launch, target: int) -> tuple[Any, ...]:
    return (*_meaning(launch), *sorted(launch.tile.items()), target)


def _may_specialize(launch: Launch) -> Iterator[bool]:
    """Whether Triton compiles a kernel for the value of each argument."""
    return (not parameter.do_not_specialize for parameter in launch.kernel.params)


def _specialized(argument: Any, may: bool) -> str:
    """Type of an argument, and what Triton's launcher compiles a kernel for: integers that are 1 or multiples of 16."""
    if isinstance(argument, torch.Tensor):
        return _POINTERS[argument.dtype]
    if isinstance(argument, float):
        return "fp32"
    kind = "i32" if argument < 2**31 else "i64"
    if argument == 1 and may:
        return "1"
    return f"{kind} aligned" if argument % _ALIGNMENT == 0 and may else kind


def compile_launch(launch: Launch, target: int) -> Row:
    """Compile a launch's kernel ahead of time.

    Args:
        launch: Its tensors need no data.
        target: Compute capability, 90 for sm_90.
    """
    import triton
    from triton.backends.compiler import GPUTarget  # type: ignore[import-untyped]

    source = triton.compiler.ASTSource(launch.kernel, *_signature(launch))
    source.make_ir = _one_at_a_time(source.make_ir)
    options = {name: value for name, value in (launch.constants | launch.tile).items() if name in _OPTIONS}
    compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    registers, spilled = _usage(compiled.asm["cubin"])
    ptx = compiled.asm["ptx"]
    units = [name for name, pattern in _TENSOR_CORE.items() if re.search(pattern, ptx)]
    return {
        "tile": _tile_text(launch),
        "registers": registers,
        "spilled": spilled,
        "shared": compiled.metadata.shared,
        "tensor_core": units[0] if units else "none",
        "cubin": len(compiled.asm["cubin"]),
    }


def _one_at_a_time(function: Callable[..., Any]) -> Callable[..., Any]:
    """Triton's front end parses Python, and CPython 3.11 counts the depth of all threads' parsing together, so that
    parsing in two threads can fail. It holds the interpreter's lock anyway; what takes time is LLVM and ptxas after it."""

    def guarded(*arguments: Any, **options: Any) -> Any:
        with _FRONT_END:
            return function(*arguments, **options)

    return guarded


def _tile_text(launch: Launch) -> str:
    """ "ROWS=128 KEYS=64, 8 warps, 2 stages"."""
    sides = " ".join(f"{name}={value}" for name, value in launch.tile.items() if name not in _OPTIONS)
    options = f"{launch.tile['num_warps']} warps, {launch.tile['num_stages']} stages"
    return f"{sides}, {options}" if sides else options


def _signature(launch: Launch) -> tuple[dict[str, str], dict[tuple[int, ...], Any], dict[tuple[int, ...], Any]]:
    """Types of all parameters, values of the constant ones, and alignment: as Triton's launcher has them."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    fixed = launch.constants | launch.tile
    for place, (name, may) in enumerate(zip(launch.kernel.arg_names, _may_specialize(launch), strict=True)):
        if place >= len(launch.arguments):
            signature[name], constants[place,] = "constexpr", fixed[name]
            continue
        known = _specialized(launch.arguments[place], may)
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
