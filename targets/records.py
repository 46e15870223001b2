"""Records of an artifact's origin for every target: config.json, the passes, the source's files."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vlmbuild.artifact.manifest import Manifest
from vlmbuild.artifact.writer import ArtifactWriter
from vlmbuild.quant.spec import QUANTIZE_PASS
from vlmbuild.recipe import BUILD_TOOLS, Recipe
from vlmbuild.rewrite.pass_manager import PassReport
from vlmbuild.targets.request import Request

_NOT_COPIED = ("auto_map", "trust_remote_code", "_attn_implementation", "attn_implementation", "torch_dtype", "dtype")


def pass_record(report: PassReport, request: Request) -> dict[str, Any]:
    """Return the manifest's record of a pass; for quantization with each layer's decision."""
    record = report.record()
    if report.name != QUANTIZE_PASS:
        return record
    decisions = [decision.record(module) for module, decision in request.decisions.items()]
    return {**record, "decisions": decisions, "calibration": request.calibration}


def artifact_config(values: Mapping[str, Any], recipe: Recipe) -> dict[str, Any]:
    """Return the source's config with our dtype, without its quantization and anything that names code."""
    config = {key: value for key, value in values.items() if key not in _NOT_COPIED}
    for key, part in config.items():
        if isinstance(part, Mapping) and key.endswith("_config"):
            config[key] = {inner: value for inner, value in part.items() if inner not in _NOT_COPIED}
    config["dtype"] = recipe.dtype
    config.pop("quantization_config", None)
    return config


def source_records(request: Request) -> list[Mapping[str, Any]]:
    """List the source's files, and an adapter's; waits for digests, which are computed during the build."""
    records = request.checkpoint.records(request.digests)
    if request.merge is not None:
        request.merge.check_unchanged()
        records.append(request.merge.record)
    return records


def publish(
    writer: ArtifactWriter,
    request: Request,
    *,
    formats: Iterable[str],
    numerics: Sequence[Mapping[str, Any]],
    toolchain: Mapping[str, str] | None = None,
) -> Manifest:
    """Publish the written files under the recipe's target. The names of the weights' formats become part of the artifact's
    name; `toolchain` has versions of the target's own tools.

    Raises:
        OutputError: There is no space, or the output cannot be written.
        IntegrityError: A written file has disappeared.
    """
    recipe = request.recipe
    target = [] if recipe.target == Recipe().target else [recipe.target]  # the default goes without saying
    return writer.publish(
        name="-".join([request.program.family, *target, *(dict.fromkeys(formats) or [recipe.dtype])]),
        target=recipe.target,
        source=source_records(request),
        recipe=recipe.to_mapping(),
        passes=[pass_record(report, request) for report in request.reports],
        toolchain={tool: importlib.metadata.version(tool).partition("+")[0] for tool in BUILD_TOOLS}
        | dict(toolchain or {}),
        numerics=numerics,
    )
