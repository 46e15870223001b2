"""Pixtral's vision prologue as a graph, and its files as transformers.js reads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vlmbuild.families.js import ClientFiles, ClientVision, image_settings, with_template
from vlmbuild.ir.program import Input


class PatchPrologue(nn.Module):
    """Patches of padded images, the row and column of each and the bounds of images; equal to `_pixtral_host.prepare`."""

    def __init__(self, patch: int) -> None:
        super().__init__()
        self.patch = patch

    def forward(self, pixel_values: Tensor, image_sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Without rows in `image_sizes` (images, 2), no image is padded."""
        images, channels, height, width = pixel_values.shape
        side, device = self.patch, image_sizes.device
        number, row, column = (torch.arange(n, device=device) for n in (images, height // side, width // side))
        whole = torch.stack([row[-1:] + 1, column[-1:] + 1], dim=1) + 0 * number.unsqueeze(1)
        given = torch.div(image_sizes, side, rounding_mode="floor")
        sizes = torch.cat([given, whole])[number]
        rows, columns = sizes.unbind(1)
        inside = (row.view(1, -1, 1) < rows.view(-1, 1, 1)) & (column.view(1, 1, -1) < columns.view(-1, 1, 1))
        places = inside.nonzero()
        grid = pixel_values.view(images, channels, height // side, side, width // side, side).permute(0, 2, 4, 1, 3, 5)
        ends = (rows * columns).cumsum(0)
        bounds = torch.cat([ends[:1] * 0, ends])
        return grid.flatten(3, 5)[places.unbind(1)], places[:, 1:], bounds.to(torch.int32)


def client_vision(config: Any) -> ClientVision:
    """What takes images (images, channels, height, width), and their sizes if they are padded."""
    vision = config.vision_config
    shape = ("images", vision.num_channels, f"{vision.patch_size}*rows", f"{vision.patch_size}*columns")
    return ClientVision(
        (Input("pixel_values", torch.float32, shape), Input("image_sizes", torch.int64, ("listed", 2))),
        PatchPrologue(vision.patch_size),
        ("pixel_values", "vision_position_ids", "vision_cu_seqlens"),
        optional=("image_sizes",),
    )


def client_batch(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A processor's images."""
    sizes = batch.get("image_sizes")
    given = {} if sizes is None else {"image_sizes": torch.as_tensor(sizes).long()}
    return {"pixel_values": batch["pixel_values"].float(), **given}


def client_files(values: Mapping[str, Any], files: ClientFiles, template: str | None) -> dict[str, Mapping[str, Any]]:
    """Patch sizes as numbers, and what transformers.js has other defaults for."""
    settings = image_settings(files)
    processor = {
        key: value for key, value in files.get("processor_config.json", {}).items() if key != "image_processor"
    }
    patch = settings.get("patch_size", processor.get("patch_size"))
    patch = patch["height"] if isinstance(patch, Mapping) else patch
    merge = processor.get("spatial_merge_size", 1)
    images = {
        **settings,
        "processor_class": "PixtralProcessor",
        "image_processor_type": "PixtralImageProcessor",
        "patch_size": patch,
        "spatial_merge_size": merge,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "resample": 3,
    }
    return {
        "config.json": {**values, "image_token_index": values.get("image_token_index", values.get("image_token_id"))},
        "preprocessor_config.json": images,
        "processor_config.json": {
            "image_token": "[IMG]",
            "image_break_token": "[IMG_BREAK]",
            "image_end_token": "[IMG_END]",
            **processor,
            "processor_class": "PixtralProcessor",
            "patch_size": patch,
            "spatial_merge_size": merge,
        },
        "tokenizer_config.json": with_template(files, template),
    }
