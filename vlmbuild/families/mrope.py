"""Grid families with positions on three axes (frame, row, column) whose processors return `image_grid_thw`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vlmbuild.errors import BatchError
from vlmbuild.families.base import InputLayout
from vlmbuild.families.batch import ImageCost, Tokens
from vlmbuild.families.config_checks import check_heads, check_placeholder, require
from vlmbuild.families.grid import BatchImage, GridFamily, over_limit
from vlmbuild.families.js import ClientVision
from vlmbuild.ir.program import Geometry, Input, Rotary


class MropeFamily(GridFamily):
    """A family whose patches are merged in squares, with images and videos.

    Attributes:
        rope_class: transformers' model with `get_rope_index`.
        client_grids: Name of the grids among the inputs of the vision encoder that transformers.js runs.
        text_rotary, vision_rotary: transformers' rotary embeddings, made from the config of the text and of the vision tower.
        interleaved: Whether the axes of text positions take turns instead of having ranges of frequencies.
    """

    rope_class: Any
    client_grids = "grid_thw"
    text_rotary: Any
    vision_rotary: Any
    interleaved = False
    vision_prefix = "model.visual."
    projector_prefix = "model.visual.merger."
    position_axes = (3,)
    resizable_keys = ("shortest_edge", "longest_edge")
    size_example = '{"shortest_edge": 3136, "longest_edge": 401408}'
    input_layout: Mapping[str, InputLayout] = {
        "pixel_values": "medium",
        "image_grid_thw": "medium",
        "pixel_values_videos": "medium",
        "video_grid_thw": "medium",
        "mm_token_type_ids": "token",
    }

    def check(self, config: Any) -> None:
        text, vision = config.text_config, config.vision_config
        sections, half = text.rope_parameters.get("mrope_section"), head_size(text) // 2
        require(
            isinstance(sections, list) and len(sections) == 3 and sum(sections) == half,
            "mrope_section",
            sections,
            f"must be three numbers, {half} angles in all, half of the head size. Without it positions would silently be "
            "one-dimensional; restore the published rope_scaling entry.",
        )
        check_heads("vision_config", self.tower_width(config), vision.num_heads, None, axes=2)
        for field in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"):
            check_placeholder(getattr(config, field), field, text.vocab_size)

    def tower_width(self, config: Any) -> int:
        """Return the width of the vision tower's blocks."""
        return int(config.vision_config.hidden_size)

    def geometry(self, config: Any) -> Geometry:
        text, width = config.text_config, self.tower_width(config) // config.vision_config.num_heads
        sections, scaling = tuple(text.rope_parameters["mrope_section"]), self.text_rotary(text).attention_scaling
        return Geometry(
            rotary=(
                Rotary(head_size(text), sections, shared=False, scaling=scaling, interleaved=self.interleaved),
                Rotary(width, (width // 4,) * 2, shared=True),
            )
        )

    def rotary_modules(self, config: Any) -> dict[str, nn.Module]:
        return {
            "model.visual.rotary_pos_emb": self.vision_rotary(config.vision_config),
            "model.language_model.rotary_emb": self.text_rotary(config.text_config),
        }

    def placeholders(self, config: Any) -> dict[int, str]:
        return {config.image_token_id: "image", config.video_token_id: "video"}

    def patch_layout(self, config: Any) -> tuple[int, int]:
        vision = config.vision_config
        return vision.in_channels * vision.temporal_patch_size * vision.patch_size**2, vision.spatial_merge_size

    def read_images(
        self, batch: Mapping[str, Tensor], config: Any, processor: Any
    ) -> tuple[list[BatchImage], Tensor | None]:
        layout = self.patch_layout(config)
        images, pixels = _read_kind(batch, "image", "pixel_values", layout)
        videos, video_pixels = _read_kind(batch, "video", "pixel_values_videos", layout)
        limit = getattr(getattr(processor, "image_processor", None), "size", {}).get("longest_edge")
        for image in images if limit else []:
            _, rows, columns = image.grid
            size = rows * columns * config.vision_config.patch_size**2
            # The processor makes no side shorter than one feature, even if the image is over the limit then.
            if size > limit and min(rows, columns) > layout[1]:
                raise over_limit(image, f"{size:,} pixels", f"{limit:,}")
        present = [tensor for tensor in (pixels, video_pixels) if tensor is not None and len(tensor)]
        return [*images, *videos], torch.cat(present) if present else None

    def position_ids(
        self, tokens: Tokens, images: Sequence[BatchImage], batch: Mapping[str, Tensor], config: Any
    ) -> Tensor:
        model = self.rope_class.__new__(self.rope_class)  # the method reads the config alone; no layers are needed
        nn.Module.__init__(model)
        model.config = config
        rows = tokens.mask.any(1)
        ids, mask = tokens.ids.cpu()[rows].long(), tokens.mask[rows]
        kinds = list(self.placeholders(config))  # transformers' type ids: text 0, image 1, video 2
        types = sum(number * (ids == token).int() for number, token in enumerate(kinds, start=1))
        grids = {
            kind: torch.tensor([image.grid for image in images if image.kind == kind], dtype=torch.int64).view(-1, 3)
            for kind in ("image", "video")
        }
        times = self.video_times(batch, len(grids["video"]))
        positions, _ = model.get_rope_index(ids, types, grids["image"], grids["video"], attention_mask=mask, **times)
        packed: Tensor = positions[:, mask].unsqueeze(1)
        return packed

    def video_times(self, batch: Mapping[str, Tensor], videos: int) -> dict[str, Any]:
        """Return what `get_rope_index` takes about the time of the videos, besides their grids."""
        return {}

    def processor_pixels(self, image_processor: Any) -> int:
        return max(int(image_processor.size[key]) for key in self.resizable_keys)

    def image_tokens(self, processor: Any, height: int, width: int) -> int:
        images = processor.image_processor
        return int(images.get_number_of_image_patches(height, width)) // int(images.merge_size) ** 2

    def image_cost(self, image_processor: Any, config: Any, height: int, width: int) -> ImageCost:
        patches = image_processor.get_number_of_image_patches(height, width)
        return ImageCost(patches, patches // self.patch_layout(config)[1] ** 2)

    def client_vision(self, config: Any) -> ClientVision | None:
        values, merge = self.patch_layout(config)
        return ClientVision(
            (
                Input("pixel_values", torch.float32, (f"{merge**2}*merged", values)),
                Input(self.client_grids, torch.int64, ("images", 3)),
            ),
            GridPrologue(merge),
            ("pixel_values", "vision_position_ids", "vision_cu_seqlens"),
        )

    def client_batch(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        pixels, grids = (
            torch.cat([batch[name] for name in names if batch.get(name) is not None])
            for names in (("pixel_values", "pixel_values_videos"), ("image_grid_thw", "video_grid_thw"))
        )
        return {"pixel_values": pixels.float(), self.client_grids: grids.long()}


def head_size(text: Any) -> int:
    """Return the channels of an attention head of the language model."""
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)


def _read_kind(
    batch: Mapping[str, Tensor], kind: str, pixel_key: str, layout: tuple[int, int]
) -> tuple[list[BatchImage], Tensor | None]:
    """Read the images or the videos of a batch, and their patches."""
    grid_key = f"{kind}_grid_thw"
    pixels, grids = batch.get(pixel_key), batch.get(grid_key)
    if (pixels is None) != (grids is None):
        missing = grid_key if grids is None else pixel_key
        raise BatchError(f"The batch has {kind}s but no {missing}. Pass everything that the processor returned.")
    if pixels is None or grids is None:
        return [], None
    if not isinstance(grids, Tensor) or not isinstance(pixels, Tensor) or grids.ndim != 2 or grids.shape[1] != 3:
        raise BatchError(
            f'{grid_key} must be a tensor of shape ({kind}s, 3). Use the processor with return_tensors="pt".'
        )
    values, merge = layout
    images = []
    for number, (t, h, w) in enumerate(grids.tolist()):
        if h % merge or w % merge or min(t, h, w) < 1:
            raise BatchError(
                f"{kind} {number}: grid {t} x {h} x {w} is not made of {merge} x {merge} blocks of patches. Use the processor "
                "that belongs to the model."
            )
        images.append(BatchImage(kind, number, (t, h, w), np.arange(t * h * w // merge**2)))
    patches = sum(image.features for image in images) * merge**2
    if tuple(pixels.shape) != (patches, values):
        raise BatchError(
            f"{pixel_key} has shape {tuple(pixels.shape)}, but the grids of the {len(images)} {kind}s in {grid_key} need "
            f"{patches} patches of {values} values. Pass the two as one call of the processor returned them."
        )
    return images, pixels


class GridPrologue(nn.Module):
    """Row and column of every patch and the bounds of frames, from grids alone, equal to `MropeFamily.prepare`.

    Patches are in the order of blocks, `merge` x `merge` of them.
    """

    def __init__(self, merge: int) -> None:
        super().__init__()
        self.merge = merge

    def forward(self, pixel_values: Tensor, grid_thw: Tensor) -> tuple[Tensor, ...]:
        frames, rows, columns = grid_thw.unbind(1)
        of_frame = rows * columns
        ends = (frames * of_frame).cumsum(0)
        patch = torch.arange(pixel_values.shape[0], device=grid_thw.device)
        image = (patch.unsqueeze(1) >= ends).sum(1)
        within = (patch - (ends - frames * of_frame)[image]) % of_frame[image]
        block = torch.div(within, self.merge**2, rounding_mode="floor")
        corner = within % self.merge**2
        across = torch.div(columns, self.merge, rounding_mode="floor")[image]
        row = torch.div(block, across, rounding_mode="floor") * self.merge
        row = row + torch.div(corner, self.merge, rounding_mode="floor")
        column = block % across * self.merge + corner % self.merge
        starts = (within == 0).nonzero().squeeze(1)
        bounds = torch.cat([starts, patch[-1:] + 1])
        return pixel_values, torch.stack([row, column], dim=1), bounds.to(torch.int32)
