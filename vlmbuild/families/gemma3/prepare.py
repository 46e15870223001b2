"""Gemma 3's host prologue: images as rows of patches, and blocks of image tokens that see each other both ways."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vlmbuild.errors import BatchError
from vlmbuild.families.base import InputLayout
from vlmbuild.families.batch import PackedBatch, repeat_end
from vlmbuild.families.gemma3.processor import Gemma3Processing
from vlmbuild.families.js import ClientVision
from vlmbuild.families.tiles import TileLayout
from vlmbuild.ir.program import Input

_TYPES = "token_type_ids"


class Gemma3Prologue(Gemma3Processing):
    """The part of the family that reads batches. Images lie in one row, with bounds: one image alone is no special case.
    Crops of pan and scan are images."""

    input_layout: Mapping[str, InputLayout] = {"pixel_values": "medium", _TYPES: "token"}

    def variants(self, config: Any) -> dict[str, tuple[Input, ...]]:
        """List the inputs of both variants; text has lookahead too, all zero, so that the layers of both are the same."""
        ahead = Input("lookahead", torch.int32, ("sequence",))
        return {name: (*inputs, ahead) for name, inputs in super().variants(config).items()}

    def image_inputs(self, config: Any) -> tuple[Input, ...]:
        return (
            *super().image_inputs(config),
            Input("vision_position_ids", torch.int64, (f"{self.tile(config).patches}*tiles",)),
            Input("vision_cu_seqlens", torch.int32, ("segments",)),
        )

    def vision_tensors(self, grids: Tensor, config: Any) -> dict[str, Tensor]:
        tile = self.tile(config)
        positions, bounds = tile.in_blocks(torch.arange(tile.patches)), torch.arange(len(grids) + 1) * tile.patches
        return {"vision_position_ids": positions.repeat(len(grids)), "vision_cu_seqlens": repeat_end(bounds)}

    def prepare(self, batch: Mapping[str, Tensor], config: Any, processor: Any = None) -> PackedBatch:
        prepared = super().prepare(batch, config, processor)
        image = torch.zeros(len(prepared.index), dtype=torch.bool)
        if prepared.variant == "image":
            _check_types(batch, config.image_token_id)
            image = prepared.tensors["feature_index"][0] >= 0
        prepared.tensors["lookahead"] = lookahead(image, prepared.index, batch["input_ids"].shape[1])
        return prepared

    def client_vision(self, config: Any) -> ClientVision | None:
        tile = self.tile(config)
        return ClientVision(
            (Input("pixel_values", torch.float32, ("images", tile.channels, tile.side, tile.side)),),
            SquarePrologue(tile),
            ("pixel_values", "vision_position_ids", "vision_cu_seqlens"),
            blocks=True,
        )

    def client_batch(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        return {"pixel_values": batch["pixel_values"].float()}


class SquarePrologue(nn.Module):
    """Patches of images, their positions and the bounds of images, equal to `Gemma3Prologue.prepare`."""

    def __init__(self, tile: TileLayout) -> None:
        super().__init__()
        self.tile = tile

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Cut images into patches, with their positions and bounds."""
        tile, device = self.tile, pixel_values.device
        number = torch.arange(pixel_values.shape[0], device=device)
        ends = (number + 1) * tile.patches
        positions = tile.in_blocks(torch.arange(tile.patches, device=device)) + 0 * number.unsqueeze(1)
        return tile.cut(pixel_values), positions.flatten(), torch.cat([ends[:1] * 0, ends]).to(torch.int32)


def lookahead(image: Tensor, index: Tensor, length: int) -> Tensor:
    """Count the tokens after each packed token that belong to its block, a run of image tokens: int32 (tokens,).

    Args:
        image: bool (tokens,), image tokens.
        index: Their indices in the flattened ids.
        length: Columns of the ids.
    """
    joined = image[:-1] & image[1:] & (index[1:] == index[:-1] + 1) & (index[1:] % length != 0)
    rows = torch.arange(len(image))
    last = torch.where(torch.nn.functional.pad(joined, (0, 1)), len(image), rows)
    return (last.flip(0).cummin(0).values.flip(0) - rows).to(torch.int32)


def _check_types(batch: Mapping[str, Tensor], token: int) -> None:
    """Raise BatchError unless `token_type_ids` mark the image tokens."""
    ids, types = batch["input_ids"], batch.get(_TYPES)
    remedy = f"Pass everything that the processor returned, {_TYPES} cut and padded together with input_ids."
    if not isinstance(types, Tensor) or types.shape != ids.shape:
        found = f"have shape {tuple(types.shape)}" if isinstance(types, Tensor) else "are missing"
        raise BatchError(
            f"{_TYPES} {found}, and input_ids have shape {tuple(ids.shape)}. With them image tokens see each other both ways. "
            f"{remedy}"
        )
    mask = batch.get("attention_mask")
    wrong = (types.cpu() == 1) != (ids.cpu() == token)
    wrong = wrong if mask is None else wrong & mask.bool().cpu()
    if wrong.any():
        sample = int(wrong.any(1).int().argmax())
        raise BatchError(
            f"Sample {sample}: {int(wrong[sample].sum())} tokens are image tokens ({token}) either by {_TYPES} or by "
            f"input_ids, and not by both. {remedy}"
        )
