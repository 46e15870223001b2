"""Devices that a user asks for by name."""

from __future__ import annotations

import torch

from vlmbuild.errors import DeviceError


def available_device(device: str | torch.device | None) -> torch.device:
    """Return the device; None is the CPU. Raises DeviceError when torch cannot use it here."""
    chosen = named_device(device)
    try:
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise _unavailable(device, error) from error
    return chosen


def named_device(device: str | torch.device | None) -> torch.device:
    """Return the device of a name, available or not; None is the CPU. Raises DeviceError when there is no such device."""
    try:
        return torch.device("cpu" if device is None else device)
    except (RuntimeError, TypeError) as error:
        raise DeviceError(
            f"{device!r} names no device of torch. Pass 'cpu' or 'cuda', or one of several GPUs, such as 'cuda:1'."
        ) from error


def _unavailable(device: str | torch.device | None, error: Exception) -> DeviceError:
    reason = str(error).partition("\n")[0].rstrip(".")
    return DeviceError(f"Device {device!r} is not available here: {reason}. Use 'cpu', or install torch for it.")
