"""Write artifacts/locks: every published config in NF4 with Triton; three unquantized with SDPA too.

python tests/helpers/make_locks.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from vlmbuild.cli.output import quiet_libraries

CONFIGS = Path(__file__).parents[1] / "configs"
LOCKS = Path(__file__).parents[2] / "artifacts" / "locks"
SMALLEST = ("qwen2-vl-2b", "llama-3.2-11b-vision", "pixtral-12b")
WITH_KERNELS = SMALLEST[:2]
"""Configs whose locks have kernel tables: between them they launch every kernel."""


def recipes(config: str) -> list[tuple[str, str]]:
    """Formats and attention that a config is locked with."""
    return [("none", "sdpa")] * (config in SMALLEST) + [("nf4", "triton")]


def main() -> None:
    quiet_libraries()
    from vlmbuild.builder.tracing import trace
    from vlmbuild.locks.document import write_lock
    from vlmbuild.locks.make import lock_traced
    from vlmbuild.recipe import QuantSpec, Recipe

    for folder in sorted(CONFIGS.iterdir()):
        values = json.loads((folder / "config.json").read_text())
        traced = trace(values, f"tests/configs/{folder.name}")
        for form, attention in recipes(folder.name):
            lock = lock_traced(
                traced,
                Recipe(quantize=QuantSpec(format=form), attention=attention),
                kernels=folder.name in WITH_KERNELS,
            )
            path = LOCKS / f"{folder.name}-{form}-{attention}.lock"
            write_lock(path, lock)
            print(f"{path.name}: {len(lock.regions)} regions, {len(lock.kernels.table)} kernels", file=sys.stderr)


if __name__ == "__main__":
    main()
