"""The GGUF target: the language model and the tower as files for llama.cpp and what is built on it.

Start with `write.py`. Names, types and quantizers are the package `gguf`'s; what llama.cpp must know of a family is in the
family's own `gguf.py`.
"""

from __future__ import annotations

from vlmbuild.targets.gguf.write import writing

__all__ = ["writing"]
