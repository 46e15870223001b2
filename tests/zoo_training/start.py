"""Weights to start from: those of a checkpoint of the zoo whose family has some of the same layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText

from vlmbuild.zoo import ZOO


def trained(name: str, renamed: Mapping[str, str]) -> dict[str, Tensor]:
    """Read the weights of a checkpoint of the zoo in float32.

    Args:
        name: Name of the checkpoint.
        renamed: Parts of its parameter names -> what is written in their place.
    """
    weights = {}
    for parameter, weight in AutoModelForImageTextToText.from_pretrained(ZOO[name]).float().named_parameters():
        for old, new in renamed.items():
            parameter = parameter.replace(old, new)
        weights[parameter] = weight.detach()
    return weights


def start_from(model: Any, weights: Mapping[str, Tensor]) -> Any:
    """Copy weights into a model's parameters of the same names, the first rows and columns where sizes differ; return the model."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in weights:
                sizes = zip(weights[name].shape, parameter.shape, strict=True)
                region = tuple(slice(min(pair)) for pair in sizes)
                parameter[region] = weights[name][region]
    return model
