"""Opening of an artifact's ONNX models: their execution provider, and a check that weights lie in the artifact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor

from vlmbuild.artifact.hub import cached_blob
from vlmbuild.errors import DeviceError, IncompatibleError
from vlmbuild.ir.dims import Dim
from vlmbuild.ir.program import Input
from vlmbuild.util.cpu import available_cores

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
FOLDER = "onnx"
_WARNINGS = 3
"""Lowest level that ONNX Runtime logs: errors. Its warnings are about its own optimizations."""
_DTYPES = {
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(int64)": torch.int64,
    "tensor(int32)": torch.int32,
    "tensor(bool)": torch.bool,
}


@dataclass(frozen=True, slots=True)
class OnnxSession:
    """One model, ready to run.

    Attributes:
        inputs: Required inputs.
        optional: Names of optional inputs.
    """

    session: Any
    inputs: tuple[Input, ...]
    optional: frozenset[str]

    def run(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return all outputs by name; values that are no inputs are ignored."""
        names = [entry.name for entry in self.inputs] + sorted(self.optional & values.keys())
        dtypes = {entry.name: entry.dtype for entry in self.inputs}
        arrays = {
            name: np.asarray(values[name].to(dtypes.get(name, values[name].dtype)).contiguous()) for name in names
        }
        outputs = self.session.get_outputs()
        results = self.session.run(None, arrays)
        return {output.name: torch.from_numpy(result) for output, result in zip(outputs, results, strict=True)}


def open_session(
    directory: Path, stem: str, device: str = "cpu", *, economical: bool = False, folder: str | None = None
) -> OnnxSession:
    """Open `onnx/STEM.onnx` of an artifact whose files have been verified.

    Args:
        directory: The artifact.
        stem: Stem of the file name.
        device: "cpu" or "cuda".
        economical: Read weights where they are mapped, without packing them: slower, in a fraction of the memory.
        folder: Path that leads to the artifact's `onnx`, whatever takes its place; None is its own path.

    Raises:
        DeviceError: This onnxruntime has no provider for the device, or it does not start.
        IncompatibleError: The model is not one that this onnxruntime can run, or its weights are not in the artifact.
    """
    onnxruntime, provider = onnx_runtime(), check_provider(device)
    file = directory / FOLDER / f"{stem}.onnx"
    opened = Path(folder, file.name) if folder else file
    check_data_files(opened, file)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = available_cores()
    options.log_severity_level = _WARNINGS
    if economical:
        options.add_session_config_entry("session.disable_prepacking", "1")
    try:
        session = onnxruntime.InferenceSession(opened, options, providers=[provider])
    except Exception as error:  # its exceptions have no common type of their own
        raise IncompatibleError(
            f"{file}: onnxruntime {onnxruntime.__version__} cannot open it: {_first_line(error)} Build it again with this "
            "version of vlmbuild, or use a newer onnxruntime."
        ) from error
    if provider not in session.get_providers():
        raise DeviceError(
            f"onnxruntime did not start its provider for {device!r}, and took {session.get_providers()[0]}. Install CUDA "
            "and cuDNN as it needs them, or use the CPU."
        )
    inputs = tuple(Input(entry.name, _dtype(file, entry), _sizes(entry.shape)) for entry in session.get_inputs())
    optional = frozenset(entry.name for entry in session.get_overridable_initializers())
    return OnnxSession(session, inputs, optional)


def onnx_runtime() -> Any:
    """Import ONNX Runtime, which the distributions onnxruntime-gpu and onnxruntime provide.

    Raises:
        IncompatibleError: Neither is installed, or it does not start.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise IncompatibleError(
            f"ONNX artifacts need ONNX Runtime, which cannot be imported: {error}. Install it with `pip install "
            "onnxruntime`, or `pip install onnxruntime-gpu` for a GPU."
        ) from error
    return onnxruntime


def _sizes(shape: Sequence[int | str]) -> list[int | Dim]:
    """Return an input's shape; ONNX names are no expressions."""
    return [size if isinstance(size, int) else Dim.named(str(size)) for size in shape]


def check_provider(device: str) -> str:
    """Return the execution provider of a device. Raises DeviceError if the installed onnxruntime has none."""
    onnxruntime = onnx_runtime()
    provider = PROVIDERS.get(device)
    available = onnxruntime.get_available_providers()
    if provider is None or provider not in available:
        raise DeviceError(
            f"The installed onnxruntime {onnxruntime.__version__} cannot run on {device!r}; it has "
            f"{', '.join(available)}. Use device='cpu', or install onnxruntime-gpu."
        )
    return provider


def check_data_files(opened: Path, file: Path | None = None) -> None:
    """Refuse a model whose weights are not complete files beside it.

    Args:
        opened: The model.
        file: Its path in messages, if another one.

    Raises:
        IncompatibleError: The model is no ONNX model, or its weights are missing, lie elsewhere, or end too early.
    """
    file = file or opened
    try:
        model = onnx.load(opened, load_external_data=False)
    except Exception as error:  # protobuf's own types
        raise IncompatibleError(f"{file} is not a readable ONNX model: {_first_line(error)} Build it again.") from error
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            _check_location(
                opened.parent, file, tensor.name, {entry.key: entry.value for entry in tensor.external_data}
            )


def _check_location(folder: Path, file: Path, tensor: str, where: Mapping[str, str]) -> None:
    location = where.get("location", "")
    data = folder / location
    if not location or Path(location).name != location or location in (".", ".."):
        raise IncompatibleError(
            f"{file}: the weight {tensor} lies at {location!r}, outside of the folder of its model. Build it again; "
            "such a model is not opened."
        )
    cached = cached_blob(file.parent.parent.resolve(), f"{FOLDER}/{location}")  # a link that the hub made, if any
    if (data.is_symlink() and cached is None) or not data.is_file():
        raise IncompatibleError(
            f"{file}: its weights {location!r} are missing. Copy the whole folder, or build it again."
        )
    offset, length = where.get("offset", "0"), where.get("length", "0")
    if not (offset.isdigit() and length.isdigit()) or int(offset) + int(length) > data.stat().st_size:
        raise IncompatibleError(
            f"{file.parent / location} ends before the weight {tensor} of {file.name} does. Copy it again."
        )


def _dtype(file: Path, entry: Any) -> torch.dtype:
    if entry.type not in _DTYPES:
        raise IncompatibleError(
            f"{file}: the input {entry.name} is a {entry.type}, which vlmbuild never writes. Build it again."
        )
    return _DTYPES[entry.type]


def _first_line(error: Exception) -> str:
    lines: Sequence[str] = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".") + "."
