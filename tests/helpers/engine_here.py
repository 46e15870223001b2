"""Workers of engines in this process: importing torch and transformers again takes longer than all that they compute.

That they run in an interpreter of their own is shown in `engines/test_verify.py`.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path


def run_here(command: Sequence[str], _: Mapping[str, str]) -> tuple[int, str]:
    """Run a Python worker as a script does."""
    _, worker, job = command
    argv, path, known = sys.argv, list(sys.path), set(sys.modules)
    sys.argv, sys.path[:0] = [worker, job], [str(Path(worker).parent)]
    try:
        runpy.run_path(worker, run_name="__main__")
    except SystemExit as end:
        return int(end.code or 0), "ended"
    finally:
        sys.argv, sys.path[:] = argv, path
        for name in set(sys.modules) - known & {"exchange", "processing", "onnx_models"}:
            sys.modules.pop(name)
    return 0, ""
