"""Adapters of a loaded model: several in memory, one of them active."""

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
class InactiveAdapter:
    """An adapter in memory that is not active: the model's modules do not have its tensors.

    Attributes:
        spec: Its LoRA layers and the parameters that it trains whole.
        program: The model's program with it; each adapter has its own, so that ranks and layers may differ.
        tensors: Its parameters by name, the same objects as when it was active.
    """

    spec: AdapterSpec
    program: Program
    tensors: Mapping[str, nn.Parameter]


class AdaptedModel(TrainerConventions):
    """A model whose adapters are added, switched, disabled, merged and deleted, under PEFT's names.

    Attributes:
        active_adapter: Name of the adapter that computes and trains; None if there is none.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._base: Program | None = None
        self._active: str | None = None
        self._inactive: dict[str, InactiveAdapter] = {}

    if TYPE_CHECKING:

        def set_tensor(self, name: str, slot: Slot, tensor: Tensor) -> None:
            """Register a slot's tensor under its name."""

        def _bind_regions(self) -> None:
            """Bind every region of the program."""

    def attach_adapter(self, spec: AdapterSpec, base: Program, name: str = "default") -> None:
        """Register the slots that passes have added to the program for an adapter, and make it the active one.

        LoRA matrices start as PEFT's do (A uniform by He et al., arXiv:1502.01852; B zero); parameters that are trained whole
        are float32.

        Args:
            spec: Its layers.
            base: The program without it.
            name: A name that no other adapter has. None of them may be active.
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
        """Name of the adapter that computes and trains; None if there is none."""
        return self._active

    @property
    def base_program(self) -> Program | None:
        """Program without the active adapter; None if there is none."""
        return self._base

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """Names of all adapters, the active one first."""
        return tuple(name for name in (self._active, *self._inactive) if name is not None)

    def set_adapter(self, adapter_name: str) -> None:  # type: ignore[override]
        """Make another adapter the active one, which computes and trains; the others keep their values.

        Optimizers keep the parameters that they were made with. A compiled model is compiled again.

        Raises:
            UsageError: There is no such adapter, the active one has modules trained whole, or the model is sharded.
        """
        if adapter_name == self._active:
            return
        if adapter_name not in self._inactive:
            raise UsageError(
                f"The model has no adapter {adapter_name!r}. Pass one of {', '.join(self.adapter_names) or 'none'}, or call "
                f"vlmbuild.load_adapter(model, DIRECTORY, adapter_name={adapter_name!r})."
            )
        self.deactivate_adapter()
        chosen = self._inactive.pop(adapter_name)
        self._base, self.program = self.program, chosen.program
        self.adapter, self._active = chosen.spec, adapter_name
        for name, parameter in chosen.tensors.items():
            path, _, leaf = name.rpartition(".")
            parameter.data = parameter.data.to(self.device)
            module_at(self, path).register_parameter(leaf, parameter)
        self._bind_regions()

    def deactivate_adapter(self) -> None:
        """Deactivate the active adapter, if there is one. The caller binds the regions of the base program.

        Raises:
            UsageError: It has modules trained whole, or the model is sharded.
        """
        if self.adapter is None or self._active is None or self._base is None:
            return
        self._check_no_whole_modules("The adapter cannot be deactivated")
        if isinstance(self, FSDPModule):
            raise UsageError(
                "The model is sharded, and its adapters cannot be switched. Choose one before vlmbuild.shard."
            )
        tensors = {name: self.get_parameter(name) for name, _ in self.program.slots() if ".lora_" in name}
        self._inactive[self._active] = InactiveAdapter(self.adapter, self.program, tensors)
        self._return_to_base(self.adapter, self._base)
        self.register_dropout()

    def _return_to_base(self, adapter: AdapterSpec, base: Program) -> None:
        for module in adapter.loras:
            layer: Any = self.get_submodule(module)
            del layer.lora_A, layer.lora_B
        self.program, self._base, self.adapter, self._active = base, None, None, None

    def delete_adapter(self, adapter_name: str) -> None:  # type: ignore[override]
        """Remove an adapter. After the active one the model computes as its artifact, until `set_adapter` activates another.

        Raises:
            UsageError: There is no such adapter, it has modules trained whole, or it is active and the model is sharded.
        """
        if adapter_name not in self.adapter_names:
            raise UsageError(
                f"The model has no adapter {adapter_name!r}. Pass one of {', '.join(self.adapter_names) or 'none'}."
            )
        if adapter_name == self._active:
            self.deactivate_adapter()
            self._bind_regions()
        del self._inactive[adapter_name]

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Compute without the adapter while the context is open.

        Raises:
            UsageError: Modules were trained whole, whose values before training are not kept.
        """
        self._check_no_whole_modules("The adapter cannot be disabled")
        self.set_adapter_disabled(True)
        try:
            yield
        finally:
            self.set_adapter_disabled(False)

    def _check_no_whole_modules(self, fault: str) -> None:
        if self.adapter is not None and self.adapter.modules:
            raise UsageError(
                f"{fault}: {self.adapter.modules[0]} was trained whole, and its values before are not kept. Load the artifact "
                "a second time for a model without the adapter."
            )

    def merge_and_unload(self) -> Self:
        """Add the active adapter to the weights, and remove it and all others. Returns the model.

        Raises:
            UsageError: There is no adapter, or one of its layers is quantized: merging needs the source's weights.
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
        self._return_to_base(self.adapter, self._base)
        self._inactive.clear()
        self.identity = None  # these are other weights now
        for name, slot in self.program.slots():
            if name in trained:
                self.set_tensor(name, slot, self.get_parameter(name).detach())
        self.tie_weights()
        self._bind_regions()
        return self
