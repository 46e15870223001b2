"""Ahead-of-time compilation of a Triton launch: registers, spills, shared memory and tensor cores, without a GPU."""

from __future__ import annotations

import re
import subprocess
import tempfile
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vlmbuild.locks.document import TENSOR_CORES, KernelRow

if TYPE_CHECKING:
    from vlmbuild.ops.triton_util import Launch

_TENSOR_CORE = {"mma": r"\bmma\.sync", "wgmma": r"wgmma\.mma_async", "tcgen05": r"tcgen05\.mma"}
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg")
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)")
_FRONT_END = threading.Lock()


class Specialized(NamedTuple):
    """A launch as Triton's launcher specializes it for its arguments' types, alignment and values.

    Attributes:
        signature: Parameter -> type.
        constants, attributes: Values of constant parameters, and alignment of others, by index.
        arguments: The specialization of each argument.
    """

    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    arguments: tuple[str, ...]


@cache
def _binder(kernel: Any, target: int) -> tuple[Any, Callable[..., Any]]:
    from triton.backends.compiler import GPUTarget  # type: ignore[import-untyped]
    from triton.compiler import make_backend  # type: ignore[import-untyped]
    from triton.runtime.jit import create_function_from_signature  # type: ignore[import-untyped]

    backend = make_backend(GPUTarget("cuda", target, 32))
    return backend, create_function_from_signature(kernel.signature, kernel.params, backend)


def specialize(launch: Launch, target: int) -> Specialized:
    """Specialize a launch by Triton's own binder."""
    kernel = launch.kernel
    backend, binder = _binder(kernel, target)
    bound, known, options = binder(*launch.arguments, **launch.constants, **launch.tile, debug=False)
    _, signature, constants, attributes = kernel._pack_args(backend, dict(options), bound, known, options)
    aligned = {index: value for index, value in attributes.items() if value}
    return Specialized(signature, constants, aligned, tuple(map(str, known[: len(launch.arguments)])))


def meaning(launch: Launch, target: int) -> tuple[Any, ...]:
    """Return all that decides the machine code, but for the tile: source, constants, and specialization of arguments."""
    return (launch.kernel.cache_key, *specialize(launch, target).arguments, *sorted(launch.constants.items()))


def compile_launch(launch: Launch, target: int) -> KernelRow:
    """Compile a launch's kernel ahead of time.

    Args:
        launch: Its tensors need no data.
        target: Compute capability, 90 for sm_90.
    """
    import triton  # type: ignore[import-untyped]
    from triton.backends.compiler import GPUTarget

    known = specialize(launch, target)
    source = triton.compiler.ASTSource(launch.kernel, known.signature, known.constants, known.attributes)
    source.make_ir = _one_at_a_time(source.make_ir)
    options = {name: value for name, value in (launch.constants | launch.tile).items() if name in OPTIONS}
    compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    registers, spilled = _usage(compiled.asm["cubin"])
    ptx = compiled.asm["ptx"]
    units = [name for name in TENSOR_CORES[1:] if re.search(_TENSOR_CORE[name], ptx)]
    return {
        "tile": _tile_text(launch),
        "registers": registers,
        "spilled": spilled,
        "shared": compiled.metadata.shared,
        "tensor_core": units[-1] if units else "none",
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
