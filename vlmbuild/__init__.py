"""vlmbuild: compile vision-language models into trainable, verified artifacts.

vlmbuild.build("Qwen/Qwen2-VL-2B-Instruct", "qwen2-vl-nf4", vlmbuild.Recipe(quantize=vlmbuild.QuantSpec()))
model, processor = vlmbuild.load("qwen2-vl-nf4")

The public names are listed in `__init__.pyi`, and imported on first use: `vlmbuild --help` must not wait for torch.
"""

from typing import Any

import lazy_loader

from vlmbuild.util.gc_paused import gc_paused

_attribute, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> Any:
    with gc_paused():  # torch and transformers make a million objects that stay
        return _attribute(name)
