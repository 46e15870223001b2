"""Plan a build from config.json alone: no weights are read, downloaded or needed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoImageProcessor
from transformers.image_utils import SizeDict

from vlmbuild.builder.build import apply_passes, check_passes, trace_program
from vlmbuild.builder.summary import WeightSummary, describe_regions, describe_roles, refusals_by_role, slot_roles
from vlmbuild.checkpoint.checkpoint import Checkpoint
from vlmbuild.checkpoint.source import Source
from vlmbuild.errors import SourceError, UsageError, reason
from vlmbuild.families import Family, ImageCost
from vlmbuild.planner.memory import Memory, Workload, estimate_memory
from vlmbuild.recipe import Recipe
from vlmbuild.rewrite.pass_manager import PassReport
from vlmbuild.targets import TARGETS, Target
from vlmbuild.targets.request import PlannedFile, StoredParameter
from vlmbuild.util.progress import Progress, silent

Image = str | Path | tuple[int, int]
"""A file, or (height, width)."""


@dataclass(frozen=True, slots=True)
class PlannedImage:
    """An image, before the processor resizes it (height and width in pixels), and its patches and tokens."""

    name: str
    height: int
    width: int
    cost: ImageCost


@dataclass(frozen=True, slots=True)
class Plan:
    """A build before it happens.

    Attributes:
        source: Where it would come from, as the manifest would name it.
        family: The model family.
        architecture: Architecture in config.json.
        recipe: Recipe of the plan.
        variants: Kinds of batches that have a graph of their own.
        regions: Graphs and how often they occur: name, instances, operators, parameters (of one instance).
        passes: Report of each pass.
        roles: role, parameters, quantized (parameters), bytes as stored, kept (why parameters are not quantized).
        ties: Name of a tensor that is not stored -> the one that it shares.
        files: Files of weights of an artifact that is exported -> their bytes.
        images: Patches and tokens of each image.
        memory: Bytes to load, to infer, and to train an adapter; None for an artifact that cannot be trained.
    """

    source: str
    family: str
    architecture: str
    recipe: Recipe
    variants: tuple[str, ...]
    regions: tuple[dict[str, Any], ...]
    passes: tuple[PassReport, ...]
    roles: tuple[dict[str, Any], ...]
    ties: dict[str, str]
    files: dict[str, int]
    images: tuple[PlannedImage, ...]
    memory: Memory | None

    @property
    def parameters(self) -> int:
        """Number of parameters of the whole model."""
        return sum(role["parameters"] for role in self.roles)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all stored tensors; a nested quantization state may turn out a few bytes shorter."""
        return sum(role["bytes"] for role in self.roles)

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "source": self.source,
            "family": self.family,
            "architecture": self.architecture,
            "recipe": self.recipe.to_mapping(),
            "variants": list(self.variants),
            "regions": list(self.regions),
            "passes": [report.record() for report in self.passes],
            "roles": list(self.roles),
            "ties": self.ties,
            "parameters": self.parameters,
            "weight_bytes": self.weight_bytes,
            **({"files": self.files} if self.files else {}),
            "images": [
                {"name": image.name, "height": image.height, "width": image.width, **image.cost._asdict()}
                for image in self.images
            ],
            **({"memory": self.memory.to_json()} if self.memory is not None else {}),
        }


def plan(
    source: str | Path | Source,
    recipe: Recipe = Recipe(),
    *,
    images: Iterable[Image] = (),
    limits: Mapping[str, int] | None = None,
    workload: Workload = Workload(),
    revision: str | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Say what a build would do.

    Args:
        source: Source of `vlmbuild.build`; a directory with nothing but config.json is enough.
        recipe: Recipe to plan.
        images: Files or (height, width) pairs whose patches and tokens to count; needs the image processor's settings too.
            Each sample of the batch that memory is estimated for has all of them; without any it is text only.
        limits: Limits that replace those in the image processor's `size`: "longest_edge", "shortest_edge".
        workload: The batch and the adapter that memory is estimated for.
        revision: Revision of a hub id.
        progress: Called with a stage's name, the amount done, and the total.

    Raises:
        UsageError: An image cannot be read, a size is not positive, the target cannot be planned, or the workload of an
            artifact that cannot be trained is given.
        SourceError: The source cannot be used, or images are given and it has no processor.
        CaptureError, PassError: The graph cannot be built.
    """
    progress = progress or silent
    target = TARGETS[recipe.target]
    _check_target(target, recipe.target, workload)
    if recipe.quantize is not None and recipe.quantize.format == "auto":
        raise UsageError(
            "auto measures weights, and a plan reads none. Plan with nf4; a budget is the bits per weight of what is "
            "quantized."
        )
    check_passes(recipe)
    sizes = [_size(image) for image in images]
    if limits and not sizes:
        raise UsageError("Limits on images change nothing without images. Pass --image FILE or --image HEIGHTxWIDTH.")
    checkpoint = Checkpoint.open(source, revision=revision, weights=False, progress=progress)
    recipe = recipe.with_source_dtype(checkpoint.artifact_dtype)
    family, config = checkpoint.family, checkpoint.config
    costs = tuple(_costs(checkpoint, sizes, limits or {}))
    program = trace_program(family, config, progress)
    reports, _ = apply_passes(program, checkpoint, recipe, progress)
    refusals = refusals_by_role(slot_roles(program), [report.record() for report in reports])
    regions = tuple(describe_regions(program))
    files = () if target.planned_files is None else tuple(target.planned_files(program, family, config, recipe))
    stored, memory = _joined(files), None
    if target.stored_parameters is not None:
        stored = list(target.stored_parameters(program, family, recipe))
        progress("memory", 0, 1)
        # The last to look at the program: it adds an adapter.
        memory = estimate_memory(
            program, family, config, getattr(torch, recipe.dtype), [image.cost for image in costs], workload
        )
        progress("memory", 1, 1)
    return Plan(
        source=checkpoint.source.uri,
        family=family.name,
        architecture=next(name for name in checkpoint.values["architectures"] if name in family.architectures),
        recipe=recipe,
        variants=tuple(program.variants),
        regions=regions,
        passes=reports,
        roles=tuple(describe_roles(_weights(stored, family), refusals)),
        ties=program.ties,
        files={file.path: file.size for file in files},
        images=costs,
        memory=memory,
    )


def _check_target(target: Target, name: str, workload: Workload) -> None:
    if target.stored_parameters is not None:
        return
    if target.planned_files is None:
        raise UsageError(
            f"A plan estimates the memory of training, and an artifact of target {name} cannot be trained. Leave "
            f"--target out to plan the trainable one; `vlmbuild build --target {name}` shows the sizes of the other."
        )
    if workload != Workload(device=workload.device):
        raise UsageError(
            f"An artifact of target {name} cannot be trained, so that its plan has no batch and no adapter. Leave out "
            "--batch, --text-tokens and --rank, or --target to plan the trainable one."
        )


def _joined(files: Iterable[PlannedFile]) -> list[StoredParameter]:
    """List the parameters of files, each once with its tensors in all of them."""
    found: dict[str, StoredParameter] = {}
    for parameter in (parameter for file in files for parameter in file.parameters):
        before = found.get(parameter.name)
        found[parameter.name] = parameter if before is None else replace(before, specs=before.specs + parameter.specs)
    return list(found.values())


def _weights(parameters: Iterable[StoredParameter], family: Family) -> Iterable[WeightSummary]:
    for parameter in parameters:
        nbytes = sum(spec.nbytes for spec in parameter.specs)
        form = None if parameter.format is None else parameter.format.describe()
        yield WeightSummary(parameter.name, family.role(parameter.name), math.prod(parameter.shape), nbytes, form)


def _size(image: Image) -> tuple[str, int, int]:
    """Return (name, height, width) of an image."""
    if isinstance(image, str | Path):
        from PIL import Image as Images

        try:
            with Images.open(image) as opened:
                return str(image), opened.height, opened.width
        except (OSError, Images.DecompressionBombError) as error:  # OSError also for a file that is no image
            raise UsageError(
                f"{image} cannot be read as an image: {reason(error)}. Give an image file or HEIGHTxWIDTH."
            ) from error
    height, width = image
    if height < 1 or width < 1:
        raise UsageError(f"An image cannot have {height} x {width} pixels. Give a positive height and width.")
    return f"{height}x{width}", height, width


def _costs(
    checkpoint: Checkpoint, sizes: Sequence[tuple[str, int, int]], limits: Mapping[str, int]
) -> Iterable[PlannedImage]:
    """Yield images with their patches and tokens, by the image processor's settings; no tokenizer is needed."""
    if not sizes:
        return
    image_processor = _image_processor(checkpoint.source)
    size = dict(image_processor.size)
    if unread := sorted(set(limits) - set(size)):
        raise UsageError(
            f"This model's image processor has no size.{unread[0]} to put a limit on; it has {', '.join(sorted(size))}. Drop "
            f"--{unread[0].replace('_', '-')}."
        )
    size |= limits
    if size.get("shortest_edge", 1) > size.get("longest_edge", math.inf):
        raise UsageError(
            f"shortest_edge {size['shortest_edge']} is above longest_edge {size['longest_edge']}. Lower it, or raise "
            "--longest-edge."
        )
    image_processor.size = SizeDict(**size)
    for name, height, width in sizes:
        try:
            cost = checkpoint.family.image_cost(image_processor, checkpoint.config, height, width)
        except ValueError as error:  # the processor's own limits, for example on the aspect ratio
            raise UsageError(f"The processor refuses the image {name}: {error}. Leave it out or crop it.") from error
        yield PlannedImage(name, height, width, cost)


def _image_processor(source: Source) -> Any:
    try:
        return AutoImageProcessor.from_pretrained(source.directory, local_files_only=True, backend="pil")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise SourceError(
            f"{source.directory} has no readable preprocessor_config.json or processor_config.json, so the tokens of images "
            "cannot be counted. Add one, or plan without images."
        ) from error
