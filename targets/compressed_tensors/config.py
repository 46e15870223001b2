"""The `quantization_config` of config.json, made of the library's own classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlmbuild.errors import UsageError
from vlmbuild.families import Family
from vlmbuild.ir.program import Program
from vlmbuild.quant.compressed_formats import CompressedFormat
from vlmbuild.quant.decide import Decision

LINEAR = "Linear"
"""Class of modules that a scheme is for, unless they are named."""


def quantization_config(program: Program, family: Family, decisions: Mapping[str, Decision]) -> dict[str, Any]:
    """Return the config with which the library opens a program's weights; {} where none is quantized.

    The most frequent format is that of all linear layers which neither other formats nor `ignore` name. Each module is
    there by all names that checkpoints and clients have for it: none of them takes the beginning or the end of a name for
    the name.

    Args:
        program: The program after quantization.
        family: Family of the program.
        decisions: Storage of each linear layer, by module name.
    """
    modules = _modules(program)
    if not modules:
        return {}
    from compressed_tensors import CompressionFormat
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus

    first, *others = sorted(modules, key=lambda form: (-len(modules[form]), form.describe()))
    named = [(form, _every_name(modules[form], family)) for form in others]
    schemes = [form.scheme(targets) for form, targets in [*named, (first, [LINEAR])]]
    quantized = {module for some in modules.values() for module in some}
    owners = {owner.removesuffix(".weight") for owner in program.ties.values()}  # embeddings, which no scheme is for
    kept = [module for module in decisions if module not in quantized | owners]
    kept += [alias.removesuffix(".weight") for alias in program.ties]
    formats = {CompressionFormat(scheme.format).value for scheme in schemes}
    config = QuantizationConfig(
        config_groups={f"group_{number}": scheme for number, scheme in enumerate(schemes)},
        format=formats.pop() if len(formats) == 1 else CompressionFormat.mixed_precision.value,
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=_every_name(kept, family),
    )
    values: dict[str, Any] = config.model_dump(mode="json")
    return values


def _modules(program: Program) -> dict[CompressedFormat, list[str]]:
    """Return the modules of each format."""
    modules: dict[CompressedFormat, list[str]] = {}
    for name, _, form in program.source_weights():
        if form is not None:
            if not isinstance(form, CompressedFormat):
                raise UsageError(
                    f"{name}: {form.name} cannot be stored with compressed-tensors. Choose --quantize w4a16."
                )
            modules.setdefault(form, []).append(name.removesuffix(".weight"))
    return modules


def _every_name(modules: list[str], family: Family) -> list[str]:
    return sorted({name for module in modules for name in (module, *family.client_names(module))})
