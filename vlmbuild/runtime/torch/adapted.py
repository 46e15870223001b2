"""Adapters of a loaded model: several in memory, one of which computes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from vlmbuild.adapters.lora import AdapterSpec
from vlmbuild.errors import UsageError
from vlmbuild.ir.program import Program, Slot
from vlmbuild.runtime.torch.conventions import TrainerConventions
from vlmbuild.runtime.torch.modules import module_at, tensor_at


@dataclass(frozen=True, slots=True)
class HeldAdapter:
    """An adapter that waits: it computes nothing, and the model's modules do not have its tensors.

    Attributes:
        spec: Its layers.
        program: The model's program with it; each adapter has its own, so that ranks and layers may differ.
        tensors: Its parameters by name, the same objects as when it was active.
    """

    spec: AdapterSpec
    program: Program
    tensors: Mapping[str, nn.Parameter]


class AdaptedModel(TrainerConventions):
    """A model whose adapters are added, exchanged, disabled, merged and deleted, under PEFT's names.

    Attributes:
        active_adapter: Name of the adapter that computes, or None.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._base: Program | None = None
        self._active: str | None = None
        self._held: dict[str, HeldAdapter] = {}

    if TYPE_CHECKING:

        def set_tensor(self, name: str, slot: Slot, tensor: Tensor) -> None:
            """Register a slot's tensor under its name."""

        def _bind_regions(self) -> None:
            """Bind every region of the program."""

    def attach_adapter(self, spec: AdapterSpec, base: Program, name: str = "default") -> None:
        """Register the slots that passes have added to the program for an adapter; `base` is the program without it. Its name
        is free, and no other adapter is active.

        LoRA matrices start as PEFT's do (A uniform by He et al., arXiv:1502.01852; B zero); parameters that are trained whole
        are float32.
        """
        for tensor_name, slot in self.program.slots():
            if ".lora_" in slot.name:
                tensor = torch.zeros(slot.shape, device=self.device)
                if ".lora_A." in slot.name:
                    nn.init.kaiming_uniform_(tensor, a=math.sqrt(5))
                self.set_tensor(tensor_name, slot, tensor)
            elif tensor_name in spec.trained:
                self.set_tensor(tensor_name, slot, self.get_parameter(tensor_name).detach().clone())
        self.tie_weights()
        self.adapter, self._base, self._active = spec, base, name
        self._bind_regions()

    @property
    def active_adapter(self) -> str | None:
        """The name of the adapter that computes, or None."""
        return self._active

    @property
    def base_program(self) -> Program | None:
        """The program without the active adapter; None if there is none."""
        return self._base

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """The names of all adapters, the active one first."""
        return tuple(name for name in (self._active, *self._held) if name is not None)

    def set_adapter(self, adapter_name: str) -> None:  # type: ignore[override]
        """Compute with another adapter from now on, and train that; the others wait with their values.

        Optimizers keep the parameters that they were made with. A compiled model is compiled again.

        Raises:
            UsageError: There is no such adapter, the active one has modules trained whole, or the model is sharded.
        """
        if adapter_name == self._active:
            return
        if adapter_name not in self._held:
            raise UsageError(
                f"The model has no adapter {adapter_name!r}. Pass one of {', '.join(self.adapter_names) or 'none'}, or call "
                f"vlmbuild.load_adapter(model, DIRECTORY, adapter_name={adapter_name!r})."
            )
        self.hold_adapter()
        held = self._held.pop(adapter_name)
        self._base, self.program = self.program, held.program
        self.adapter, self._active = held.spec, adapter_name
        for name, parameter in held.tensors.items():
            path, _, leaf = name.rpartition(".")
            parameter.data = parameter.data.to(self.device)
            module_at(self, path).register_parameter(leaf, parameter)
        self._bind_regions()

    def hold_adapter(self) -> None:
        """Let the active adapter wait, if there is one: the model is the base afterwards, but not bound yet.

        Raises:
            UsageError: It has modules trained whole, or the model is sharded.
        """
        if self.adapter is None or self._active is None or self._base is None:
            return
        self._check_parts("The adapter cannot be exchanged")
        if isinstance(self, FSDPModule):
            raise UsageError(
                "The model is sharded, and its adapters cannot be exchanged. Choose one before vlmbuild.shard."
            )
        tensors = {name: self.get_parameter(name) for name, _ in self.program.slots() if ".lora_" in name}
        self._held[self._active] = HeldAdapter(self.adapter, self.program, tensors)
        for module in self.adapter.loras:
            layer: Any = self.get_submodule(module)
            del layer.lora_A, layer.lora_B
        self.program, self._base, self.adapter, self._active = self._base, None, None, None
        self.register_dropout()

    def delete_adapter(self, adapter_name: str) -> None:  # type: ignore[override]
        """Remove an adapter. Without the active one the model computes as its artifact; `set_adapter` chooses another.

        Raises:
            UsageError: There is no such adapter, or it has modules trained whole.
        """
        if adapter_name not in self.adapter_names:
            raise UsageError(
                f"The model has no adapter {adapter_name!r}. Pass one of {', '.join(self.adapter_names) or 'none'}."
            )
        if adapter_name == self._active:
            self.hold_adapter()
            self._bind_regions()
        del self._held[adapter_name]

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Compute without the adapter while the context is open.

        Raises:
            UsageError: Modules were trained whole, whose values before training are not kept.
        """
        self._check_parts("The adapter cannot be disabled")
        self.set_adapter_disabled(True)
        try:
            yield
        finally:
            self.set_adapter_disabled(False)

    def _check_parts(self, fault: str) -> None:
        if self.adapter is not None and self.adapter.modules:
            raise UsageError(
                f"{fault}: {self.adapter.modules[0]} was trained whole, and its values before are not kept. Load the artifact "
                "a second time for a model without the adapter."
            )

    def merge_and_unload(self) -> Self:
        """Add the active adapter to the weights, and remove it and all others. Returns the model.

        Raises:
            UsageError: There is no adapter, or a layer below it is quantized, where merging needs the source's weights.
        """
        if self.adapter is None or self._base is None:
            raise UsageError("The model has no adapter to merge. Call vlmbuild.load_adapter(model, DIRECTORY) first.")
        loras, trained = self.adapter.loras, self.adapter.trained
        parameters = dict(self.named_parameters(remove_duplicate=False))
        if quantized := [module for module in loras if f"{module}.weight" not in parameters]:
            raise UsageError(
                f"{quantized[0]} is quantized, and merging into it would round it again. Save the adapter, and merge it "
                "with vlmbuild build SOURCE --adapter DIRECTORY -o OUTPUT."
            )
        with torch.no_grad():
            for module, lora in loras.items():
                layer, weight = self.get_submodule(module), parameters[f"{module}.weight"]
                down, up = (tensor_at(layer, f"{part}.default.weight").float() for part in ("lora_A", "lora_B"))
                weight.copy_(weight.float() + lora.scaling * (up @ down))
                del layer.lora_A, layer.lora_B
        self.program, self._base, self.adapter, self._active = self._base, None, None, None
        self._held.clear()
        for name, slot in self.program.slots():
            if name in trained:
                self.set_tensor(name, slot, self.get_parameter(name).detach())
        self.tie_weights()
        self._bind_regions()
        return self
