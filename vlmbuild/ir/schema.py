"""Names in stored programs that are read without torch."""

from __future__ import annotations

from typing import Literal

SCHEMA = "vlmbuild.program/2"
PROGRAM_FILE = "graph/program.json"
"""Path in an artifact."""
TENSORS_FILE = "graph/tensors.json"
"""Where a target keeps weights under names that are not the program's: parameter -> [file, name, bytes] of its tensors."""

SlotKind = Literal["parameter", "buffer", "constant"]
Role = Literal["vision", "projector", "embedding", "language", "head"]
