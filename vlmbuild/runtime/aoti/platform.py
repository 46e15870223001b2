"""The platform of machine code, and whether it can run here. Nothing here opens such code."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch

from vlmbuild.errors import IncompatibleError
from vlmbuild.util.records import read_as

_CPUINFO = Path("/proc/cpuinfo")
_LEVELS: dict[str, tuple[str, ...]] = {
    "x86-64-v2": ("cx16", "lahflm", "popcnt", "sse41", "sse42", "ssse3"),
    "x86-64-v3": ("abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe", "xsave"),
    "x86-64-v4": ("avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl"),
}
"""Each level has the features of those before it (System V ABI for AMD64, table 3.1)."""

_SETS = (
    *("abm", "adx", "aes", "amx", "avx", "bmi", "cx16", "f16c", "fma", "gfni", "lahf", "movbe", "pclmul", "popcnt"),
    *("sha", "sse", "ssse", "vaes", "vpclmul", "xsave"),
)
"""Prefixes of instruction sets on x86, where the system lists other features too."""


@dataclass(frozen=True, slots=True)
class CodePlatform:
    """The requirements of CPU code on the machine that runs it.

    Attributes:
        machine: Architecture of the processor, for example "x86_64".
        level: Microarchitecture level; "" for code that uses all features of one processor.
        features: Instruction sets that it may use, without punctuation ("avx512vl"), sorted.
        torch: Version of torch, whose libraries it is linked to.
        libc: C library and version, for example "glibc 2.36"; "" if unknown.
    """

    machine: str
    level: str
    features: tuple[str, ...]
    torch: str
    libc: str

    @property
    def folder(self) -> str:
        """Name of the folder for such code, for example "cpu-x86-64-v4"."""
        return f"cpu-{self.level or self.machine}"

    def record(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self) | {"features": list(self.features)}

    @classmethod
    def from_record(cls, record: Any) -> Self:
        """Read JSON values. Raises UsageError for anything but a platform."""
        platform: Self = read_as(cls, record, "platform")
        return platform


def this_platform(features: tuple[str, ...] = (), *, levels: bool = True) -> CodePlatform:
    """Return the platform of code compiled here: for this processor's level with `features`, or, without levels, for all of
    its instruction sets."""
    here = cpu_features()
    level = ""
    needed = set(features)
    for name, added in _LEVELS.items() if levels and platform.machine() == "x86_64" else ():
        if not here.issuperset(added):
            break
        level = name
        needed.update(added)
    return CodePlatform(
        platform.machine(),
        level,
        tuple(sorted(needed if level else here)),
        _torch_version(),
        " ".join(platform.libc_ver()).strip(),
    )


def check_platform(needed: CodePlatform, where: str) -> None:
    """Refuse code that cannot run here.

    Raises:
        IncompatibleError: It is for another processor, or for other versions of torch or of the C library.
    """
    here = this_platform()
    missing = sorted({*needed.features, *_level_features(needed.level)} - cpu_features())
    problems = [
        (needed.machine != here.machine, f"for processors of type {needed.machine}, and this one is {here.machine}"),
        (needed.level not in ("", *_LEVELS), f"for the level {needed.level!r}, which is not known"),
        (not needed.features, "for a processor whose features are not known"),
        (bool(missing), f"for processors with {', '.join(missing)}, which this one lacks"),
        (needed.torch != here.torch, f"for torch {needed.torch}, and {here.torch} is installed"),
        (
            not _runs_on(needed.libc, here.libc),
            f"for {needed.libc} or newer, and here is {here.libc or 'another C library'}",
        ),
    ]
    for wrong, problem in problems:
        if wrong:
            raise IncompatibleError(
                f"{where}: its code was compiled {problem}. Build the artifact again on a machine like this one."
            )


def _level_features(level: str) -> list[str]:
    """Return the features of a level and of those before it."""
    names = list(_LEVELS)
    return [feature for name in names[: names.index(level) + 1] for feature in _LEVELS[name]] if level in names else []


def cpu_features() -> frozenset[str]:
    """Return instruction sets of this processor, without punctuation; none if the system lists none."""
    try:
        lines = _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    for line in lines:
        name, _, value = line.partition(":")
        words = frozenset(plain_feature(word) for word in value.split())
        if name.strip() == "flags":
            return frozenset(word for word in words if word.startswith(_SETS))
        if name.strip() == "Features":
            return words
    return frozenset()


def plain_feature(name: str) -> str:
    """Return a feature without punctuation: the system writes "avx512_vnni", compilers "avx512vnni"."""
    return "".join(character for character in name.lower() if character.isalnum())


def _torch_version() -> str:
    return torch.__version__.partition("+")[0]


def _runs_on(needed: str, here: str) -> bool:
    """Return whether code for one C library runs on another: the same one, at least as new."""
    (library, _, version), (installed, _, newest) = needed.partition(" "), here.partition(" ")
    if not needed or library != installed:
        return not needed
    parts, known = version.split("."), newest.split(".")
    numbers = all(part.isdecimal() and len(part) < 10 for part in (*parts, *known))
    return numbers and [*map(int, parts)] <= [*map(int, known)]
