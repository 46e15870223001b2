"""The target compressed-tensors: an ordinary Hugging Face checkpoint, quantized in the layouts and with the config classes of
the library of that name, which vLLM, SGLang and transformers open.

`write.py` writes it, `config.py` makes its `quantization_config`; the formats are in `vlmbuild.quant.compressed_formats`.
"""

from __future__ import annotations

from vlmbuild.targets.compressed_tensors.write import check, writing

__all__ = ["check", "writing"]
