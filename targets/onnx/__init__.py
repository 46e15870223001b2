"""The ONNX target: a program's graphs as ONNX models.

Start with `models.py`, which says which parts go into which model, then `translate.py` and the tables `aten.py` and
`operators.py`. The opset and the oldest ONNX Runtime are in `graph_builder.py`.
"""

from __future__ import annotations

from vlmbuild.targets.onnx.write import planned_files, writing

__all__ = ["planned_files", "writing"]
