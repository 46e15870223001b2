"""vlmbuild: compile vision-language models into trainable, verified artifacts.

vlmbuild.build("Qwen/Qwen2-VL-2B-Instruct", "qwen2-vl-nf4", vlmbuild.Recipe(quantize=vlmbuild.QuantSpec()))
model, processor = vlmbuild.load("qwen2-vl-nf4")

The public names are listed in `__init__.pyi`, and imported on first use: `vlmbuild --help` must not wait for torch.
"""

from pathlib import Path
from typing import Any

import lazy_loader

if not Path(__file__).with_name("passes").is_dir():
    # In a checkout `passes/` and `targets/` are beside this folder. The rest of it becomes importable below `vlmbuild.` too
    # (`vlmbuild.tests`, `vlmbuild.vlmbuild`): import none of it so, for it would be a second copy.
    __path__.append(str(Path(__file__).parents[1]))

from vlmbuild.util.gc_paused import gc_paused
from vlmbuild.util.torchvision import blame_torchvision

_attribute, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> Any:
    with blame_torchvision(), gc_paused():  # torch and transformers make a million objects that stay
        return _attribute(name)
