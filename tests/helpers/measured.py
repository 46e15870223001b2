"""Exports are measured in the test's own process: one of their own would import torch and transformers for each build.

That builds measure in a process of their own is shown in `measure/test_onnx_parity.py` and `targets/aoti/test_write.py`.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Self

from vlmbuild.measure.numerics import Measurement, Record, check_records
from vlmbuild.util.progress import Progress

PLACES = ("vlmbuild.measure.onnx_parity.Measurement", "vlmbuild.measure.aoti_parity.Measurement")
"""Names of the class where exports are measured."""


class MeasuredHere(Measurement):
    """A measurement by the function that the process would run."""

    def __init__(self, module: str, directory: Path, dtype: str, what: str) -> None:
        super().__init__(module, directory, dtype, what)
        self._measure = lambda: importlib.import_module(module).measure(directory, dtype)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def records(self, progress: Progress) -> list[Record]:
        progress("numerics", 0, 1)
        records: list[Record] = self._measure()
        check_records(records, self._what)
        progress("numerics", 1, 1)
        return records
