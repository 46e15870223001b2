"""The `quantization_config` of config.json, as transformers writes and reads it for bitsandbytes."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

from vlmbuild.errors import SourceError, UsageError
from vlmbuild.formats import WeightFormat
from vlmbuild.quant.dequantized import METHODS
from vlmbuild.quant.int8 import Int8, threshold_of
from vlmbuild.quant.nf4 import FP4, NF4

MIXED: Final = "vlmbuild"
"""Method of artifacts that transformers refuses: with 4-bit and 8-bit weights, or with a format that it does not know."""


def quantization_config(
    formats: Collection[WeightFormat], *, skip_modules: Sequence[str], compute_dtype: str
) -> dict[str, Any]:
    """Return the config with which transformers opens weights of these formats.

    4-bit weights of several kinds open together: each carries its own state, and the config describes the first.

    Args:
        formats: Formats of the weights, the most frequent first.
        skip_modules: Full module names as transformers 5 has them (`model.visual.merger.mlp.0`), not the names on disk. An
            empty list means that every linear layer is quantized; transformers then adds nothing of its own.
        compute_dtype: Dtype of the computation.

    Raises:
        UsageError: transformers would read a name as a pattern.
    """
    for name in skip_modules:
        if not re.fullmatch(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*", name):
            raise UsageError(
                f"The module name {name!r} in the skip list is not a plain dotted name. Rename the module."
            )
    entries = [form.config_entries() for form in formats]
    config = {
        "load_in_4bit": False,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "fp4",
        "bnb_4bit_use_double_quant": False,
        "bnb_4bit_compute_dtype": "float32",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": sorted(skip_modules),
        "llm_int8_threshold": 6.0,
    }
    for values in reversed(entries):
        config |= values
    if config["load_in_4bit"]:
        config["bnb_4bit_compute_dtype"] = compute_dtype
    one_library = all(entries) and not (config["load_in_4bit"] and config["load_in_8bit"])
    return {"quant_method": "bitsandbytes" if one_library else MIXED, **config}


def check_method(config: object, where: str) -> Mapping[str, Any]:
    """Return a source's `quantization_config`. Raises SourceError with `where` for a method that cannot be read."""
    method = config.get("quant_method", "bitsandbytes") if isinstance(config, Mapping) else config
    if not isinstance(config, Mapping) or method not in ("bitsandbytes", MIXED, *METHODS):
        raise SourceError(
            f"{where} is quantized with {method}. Sources may be unquantized, or quantized with bitsandbytes, "
            f"{', '.join(METHODS)}; build from the unquantized checkpoint."
        )
    return config


def announced_format(config: Mapping[str, Any]) -> WeightFormat:
    """Return the format that the config alone announces; block size and more are stored beside each weight."""
    if config.get("load_in_8bit") or config.get("_load_in_8bit"):
        return Int8(threshold_of(config))
    four = NF4 if config.get("bnb_4bit_quant_type") == "nf4" else FP4
    return four(64, config.get("bnb_4bit_use_double_quant") is True)


def is_skipped(module: str, skip_modules: Sequence[str]) -> bool:
    """Return whether transformers 5 leaves a module unquantized: a name covers modules below it and names that end with it."""
    return any(module == name or module.startswith(f"{name}.") or module.endswith(name) for name in skip_modules)
