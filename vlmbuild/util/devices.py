"""Devices that a user asks for by name."""

from __future__ import annotations

import torch

from vlmbuild.errors import DeviceError


def available_device(device: str | torch.device | None) -> torch.device:
    """The device; None is the CPU. Raises DeviceError when it is not available here."""
    try:
        chosen = torch.device("cpu" if device is None else device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise DeviceError(
            f"Device {device!r} is not available here: {reason} Use 'cpu', or install torch for it."
        ) from error
    return chosen
