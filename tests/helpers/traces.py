"""Each model is traced once a process: most of a tiny model's build is its trace.

That a trace is the same every time is shown where other processes trace (`builder/test_cache.py`, `locks/test_document.py`); tests of tracing itself call `capture`.
"""

from __future__ import annotations

import copy
import json
from typing import Any

from vlmbuild.builder import build as builder
from vlmbuild.families import Family
from vlmbuild.ir.program import Program
from vlmbuild.util.progress import Progress, silent

PLACES = ("vlmbuild.builder.build", "vlmbuild.planner.plan", "vlmbuild.builder.tracing")
"""Modules that trace, by their own name for it."""
_trace = builder.trace_program
_traced: dict[tuple[str, str], Program] = {}


def traced(family: Family, config: Any, progress: Progress = silent) -> Program:
    """A copy of the model as captured and outlined, before any pass; with the progress of a trace."""
    values = {name: value for name, value in config.to_dict().items() if name != "dtype"}  # a trace has its own
    key = family.name, json.dumps(values, sort_keys=True, default=str)
    if key not in _traced:
        _traced[key] = _trace(family, config, progress)
    else:
        for variant in family.variants(config):
            progress(f"capture {variant}", 0, 1)
            progress(f"capture {variant}", 1, 1)
    return copy.deepcopy(_traced[key])
