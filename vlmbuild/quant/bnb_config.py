"""The `quantization_config` of config.json, as transformers writes and reads it for bitsandbytes."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

from vlmbuild.errors import SourceError, UsageError
from vlmbuild.formats import EightBit, FourBit, WeightFormat

MIXED: Final = "vlmbuild"
"""The method of artifacts with 4-bit and 8-bit weights, which transformers refuses: it takes one of the two."""


def quantization_config(
    formats: Collection[WeightFormat], *, skip_modules: Sequence[str], compute_dtype: str
) -> dict[str, Any]:
    """The config with which transformers opens weights of these formats.

    4-bit weights of several kinds open together: each carries its own state, and what is said here is the first's.
    `skip_modules` are full module names as transformers 5 has them (`model.visual.merger.mlp.0`), not the names on
    disk. An empty list means that every linear layer is quantized; transformers then adds nothing of its own.
    Raises UsageError for a name that transformers would read as a pattern.
    """
    for name in skip_modules:
        if not re.fullmatch(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*", name):
            raise UsageError(f"The module name {name!r} in the skip list is not a plain dotted name.")
    four = next((item for item in formats if isinstance(item, FourBit)), None)
    eight = next((item for item in formats if isinstance(item, EightBit)), None)
    first = four or FourBit()
    return {
        "quant_method": "bitsandbytes" if four is None or eight is None else MIXED,
        "load_in_4bit": four is not None,
        "load_in_8bit": eight is not None,
        "bnb_4bit_quant_type": first.name if four else "fp4",
        "bnb_4bit_use_double_quant": first.double_quant if four else False,
        "bnb_4bit_compute_dtype": compute_dtype if four else "float32",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": sorted(skip_modules),
        "llm_int8_threshold": eight.threshold if eight else 6.0,
    }


def check_method(config: object, where: str) -> Mapping[str, Any]:
    """A source's quantization_config, if its weights are in a layout that can be read.

    Raises SourceError with `where` for other methods.
    """
    method = config.get("quant_method", "bitsandbytes") if isinstance(config, Mapping) else config
    if not isinstance(config, Mapping) or method not in ("bitsandbytes", MIXED):
        raise SourceError(
            f"{where} is quantized with {method}. Sources may be unquantized, or quantized with bitsandbytes; build from "
            "the unquantized checkpoint."
        )
    return config


def threshold_of(config: Mapping[str, Any]) -> float:
    """LLM.int8's threshold for outliers."""
    value = config.get("llm_int8_threshold", 6.0)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else 6.0


def announced_format(config: Mapping[str, Any]) -> WeightFormat:
    """The format that the config alone tells of; block size and more stand beside each weight."""
    if config.get("load_in_8bit") or config.get("_load_in_8bit"):
        return EightBit(threshold_of(config))
    quant_type = config.get("bnb_4bit_quant_type")
    return FourBit("nf4" if quant_type == "nf4" else "fp4", 64, config.get("bnb_4bit_use_double_quant") is True)


def is_skipped(module: str, skip_modules: Sequence[str]) -> bool:
    """Whether transformers 5 leaves a module unquantized: a name covers what is below it, and what ends with it."""
    return any(module == name or module.startswith(f"{name}.") or module.endswith(name) for name in skip_modules)
