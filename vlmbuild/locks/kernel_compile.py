"""Ahead-of-time compilation of a Triton launch: registers, spills, shared memory and tensor cores, without a GPU."""

from __future__ import annotations

import re
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from vlmbuild.ops.triton_util import Launch

_TENSOR_CORE = {"tcgen05": r"tcgen05\.mma", "wgmma": r"wgmma\.mma_async", "mma": r"\bmma\.sync"}
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg")
POINTERS = {
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


def meaning(launch: Launch) -> tuple[Any, ...]:
    """Return all that decides the machine code, but for the tile: source, constants, and specialization of arguments."""
    known = map(_specialized, launch.arguments, _may_specialize(launch))
    return (launch.kernel.cache_key, *known, *sorted(launch.constants.items()))


def _may_specialize(launch: Launch) -> Iterator[bool]:
    """Yield for each argument whether Triton compiles a kernel for its value."""
    return (not parameter.do_not_specialize for parameter in launch.kernel.params)


def _specialized(argument: Any, may: bool) -> str:
    """Return an argument's type as Triton's launcher specializes it: integers that are 1 or multiples of 16."""
    if isinstance(argument, torch.Tensor):
        return POINTERS[argument.dtype]
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
    import triton  # type: ignore[import-untyped]
    from triton.backends.compiler import GPUTarget  # type: ignore[import-untyped]

    source = triton.compiler.ASTSource(launch.kernel, *_signature(launch))
    source.make_ir = _one_at_a_time(source.make_ir)
    options = {name: value for name, value in (launch.constants | launch.tile).items() if name in OPTIONS}
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
    """Run a function in one thread at a time.

    Triton's front end parses Python, and CPython 3.11 counts the depth of all threads' parsing together, so that parsing
    in two threads can fail. It holds the interpreter's lock anyway; LLVM and ptxas after it take the time.
    """

    def guarded(*arguments: Any, **options: Any) -> Any:
        with _FRONT_END:
            return function(*arguments, **options)

    return guarded


def _tile_text(launch: Launch) -> str:
    """Format a tile: "BLOCK_M=128 BLOCK_N=64, 8 warps, 2 stages"."""
    sides = " ".join(f"{name}={value}" for name, value in launch.tile.items() if name not in OPTIONS)
    options = f"{launch.tile['num_warps']} warps, {launch.tile['num_stages']} stages"
    return f"{sides}, {options}" if sides else options


def _signature(launch: Launch) -> tuple[dict[str, str], dict[tuple[int, ...], Any], dict[tuple[int, ...], Any]]:
    """Return types of all parameters, values of the constant ones, and alignment, as Triton's launcher has them."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    fixed = launch.constants | launch.tile
    for index, (name, may) in enumerate(zip(launch.kernel.arg_names, _may_specialize(launch), strict=True)):
        if index >= len(launch.arguments):
            signature[name], constants[index,] = "constexpr", fixed[name]
            continue
        known = _specialized(launch.arguments[index], may)
        if known == "1":
            signature[name], constants[index,] = "constexpr", 1
            continue
        signature[name] = known.removesuffix(" aligned")
        if known.startswith("*") or known.endswith(" aligned"):
            attributes[index,] = [["tt.divisibility", _ALIGNMENT]]
    return signature, constants, attributes


def _usage(cubin: bytes) -> tuple[int, int]:
    """Return (registers of a thread, bytes that it spills to local memory), by NVIDIA's tool in Triton's wheel."""
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
