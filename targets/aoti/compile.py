"""Compile one region with AOTInductor, into a package without constants."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch
from torch._inductor import config as inductor
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.cpu_vec_isa import pick_vec_isa
from torch._inductor.package.package import package_aoti
from torch.fx import GraphModule

from vlmbuild.runtime.aoti.platform import CodePlatform, plain_feature, this_platform

_PARTS = {".wrapper.so": True, ".wrapper_metadata.json": True, ".wrapper.json": False}
"""Ends of the files that make a package, and whether each must be there: machine code, its requirements, calls of our
own operators. The rest are sources, which name folders of this machine."""
_MARCH = "cpp.march"
_NAMELESS = ("-s", "-Wno-builtin-macro-redefined", '-D__FILE__="code"')
"""The compiler's options that keep names of files, which depend on where inductor's cache is, out of the code."""

_VECTORS = {
    "realize_reads_threshold": 1,
    "realize_opcount_threshold": 2,
    "cpp.enable_floating_point_contract_flag": "fast",
}
"""Loops of a matrix times a vector take as long as reading the matrix only if they do nothing else: what the vector is
made of is computed before, and a product and its sum are one instruction."""


def platform_compiled_for() -> CodePlatform:
    """Return the requirements of code that is compiled here: the processor's level, and instructions of inductor's
    kernels.

    Before torch 2.13 inductor compiles for the very processor.
    """
    if _MARCH not in inductor.get_config_copy():
        return this_platform(levels=False)
    flags = pick_vec_isa().build_arch_flags().split()
    return this_platform(tuple(plain_feature(flag.removeprefix("-m")) for flag in flags))


def cpp_compiler() -> str:
    """Return the first line of the C++ compiler's `--version`; "none" without one, which fails again when compiling."""
    try:
        said = subprocess.run([get_cpp_compiler(), "--version"], capture_output=True, text=True, check=True)  # noqa: S603
    except Exception:  # inductor's for a compiler that is not there, and the system's
        return "none"
    return said.stdout.partition("\n")[0]


def compile_region(graph: GraphModule, package: Path, level: str, *, one_token: bool = False) -> None:
    """Compile a region's graph into a package; the same graph gives the same bytes, wherever it is compiled.

    Args:
        graph: Graph whose placeholders have fake tensors.
        package: The file to make.
        level: Level of x86-64, or "" for this very processor.
        one_token: True if the graph multiplies matrices by vectors.

    Raises:
        Exception: Inductor or the C++ compiler failed; they raise many kinds.
    """
    inputs = tuple(node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder")
    with torch.no_grad():
        files = torch._inductor.aot_compile(graph, inputs, options=_options(level, one_token))
    assert isinstance(files, list)
    build = package.with_suffix(".files")
    build.mkdir(parents=True)
    kept: list[Any] = []
    for end, needed in _PARTS.items():
        found = [str(file) for file in files if str(file).endswith(end)]
        assert len(found) == 1 or (not found and not needed), files
        kept += [shutil.copyfile(file, str(build / f"region{end}")) for file in found]
    packed = package_aoti(str(build / "region.pt2"), {"model": kept})  # the archive's name is in it
    shutil.move(str(packed), package)


def _options(level: str, one_token: bool) -> dict[str, Any]:
    """Return inductor's options: one thread pool of the process that runs the code, no debug symbols, no paths of this
    machine."""
    options: dict[str, Any] = {
        "aot_inductor.package": True,
        "aot_inductor.precompile_headers": False,  # takes longer than all regions together; the code is the same
        "cpp_cache_precompile_headers": False,
        "cpp.dynamic_threads": True,
        "aot_inductor.enable_line_tables": False,
        "aot_inductor.compile_wrapper_opt_level": "Og",  # half of what g++ takes is this code, which only calls kernels
        _MARCH: f"{level or 'native'} {shlex.join(_NAMELESS)}",  # inductor has no other place for options
    }
    if one_token:
        options |= _VECTORS
    known = inductor.get_config_copy()
    return {name: value for name, value in options.items() if name in known}
