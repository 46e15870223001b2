"""The AOTInductor target: the trainable layout, and beside it machine code of the regions for inference."""

from __future__ import annotations

from vlmbuild.targets.aoti.write import writing

__all__ = ["writing"]
