"""The trainable model: a module tree with transformers' parameter names whose blocks share one graph each."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationConfig
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast

from vlmbuild.errors import UsageError
from vlmbuild.families import Family, HostBatch
from vlmbuild.program import Call, Program, Role, Slot, Variant, join
from vlmbuild.runtime.compiler import Compiler, swap_compiler
from vlmbuild.runtime.generation import WithoutCache
from vlmbuild.runtime.region_instance import BoundRegion, RegionInstance, carried_activations, is_compute


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """A LoRA adapter's rank and alpha."""

    r: int
    alpha: float


class VisionLanguageModel(nn.Module, WithoutCache):
    """A program bound to weights.

    `model(**processor_batch, labels=labels)` gives `.loss` and `.logits`; `model.generate(**processor_batch, ...)` is
    transformers' own generation. Under `torch.compile` each distinct region compiles once, for all instances, batch
    shapes and image sizes.
    """

    main_input_name = "input_ids"
    _is_stateful = False
    accepts_loss_kwargs = True

    def __init__(
        self, program: Program, family: Family, config: Any, tensors: Mapping[str, Tensor], dtype: torch.dtype
    ) -> None:
        """
        Args:
            program: After its passes.
            family: The program's family.
            config: The transformers config.
            tensors: Every slot of kind "parameter" or "buffer" by module name; constants come from the family.
            dtype: The compute dtype.
        """
        super().__init__()
        self.program = program
        self.family = family
        self.config = config
        self.generation_config = GenerationConfig.from_model_config(config)
        self.processor: Any = None
        """Belongs to the model; batches are held against its pixel limits."""
        self.checkpointing = False
        self.adapter: AdapterSpec | None = None
        self._dtype = dtype
        self._bound = {
            name: BoundRegion(region, dtype, carried_activations(region, program.variants))
            for name, region in program.regions.items()
        }
        self._add_instances()
        constants = family.constants(config)
        for name, slot in program.slots():
            self.set_tensor(name, slot, constants[name] if slot.kind == "constant" else tensors[name])
        self._tie()

    # Tensors ------------------------------------------------------------------------------------------------------

    def set_tensor(self, name: str, slot: Slot, tensor: Tensor) -> None:
        """Register a slot's tensor under its name; floating weights follow the compute dtype."""
        path, _, leaf = name.rpartition(".")
        owner = _module_at(self, path)
        tensor = tensor.to(self._dtype if is_compute(slot) else slot.dtype)
        if slot.kind == "parameter":
            owner.register_parameter(leaf, nn.Parameter(tensor))
        else:
            owner.register_buffer(leaf, tensor, persistent=slot.kind == "buffer")

    def adopt_adapter(self, spec: AdapterSpec, regions: Iterable[str]) -> None:
        """Take over the graphs of regions to which a pass has added LoRA slots, and start the adapter at zero: A as PEFT
        does it (He et al., arXiv:1502.01852, uniform), B zero."""
        for name in regions:
            region = self.program.regions[name]
            for instance in region.instances:
                for slot in region.slots:
                    if ".lora_" in slot.name:
                        tensor = torch.zeros(slot.shape, device=self.device)
                        if ".lora_A." in slot.name:
                            nn.init.kaiming_uniform_(tensor, a=math.sqrt(5))
                        self.set_tensor(join(instance, slot.name), slot, tensor)
            self._bound[name].rebind(self._dtype)
        self.adapter = spec

    def roles_of(self, modules: Collection[str]) -> tuple[Role, ...]:
        """The roles of the weights of these modules."""
        return tuple(
            sorted({slot.role for name, slot in self.program.slots() if name.removesuffix(".weight") in modules})
        )

    def _add_instances(self) -> None:
        for name, region in self.program.regions.items():
            for instance in region.instances:
                if instance:
                    path, _, leaf = instance.rpartition(".")
                    _module_at(self, path).add_module(leaf, RegionInstance(self._bound[name]))

    def _tie(self) -> None:
        for alias, name in self.program.ties.items():
            path, _, leaf = alias.rpartition(".")
            _module_at(self, path).register_parameter(leaf, self.get_parameter(name))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """`.to`, `.half`, `.cuda`, ...: tensors with a dtype of their own (frequencies, scales, adapters) keep it."""
        fixed = {
            self.get_parameter(name) if slot.kind == "parameter" else self.get_buffer(name)
            for name, slot in self.program.slots()
            if not is_compute(slot)
        }

        def convert(tensor: Tensor) -> Tensor:
            converted = fn(tensor)
            if tensor in fixed and converted.dtype != tensor.dtype:
                return tensor.to(converted.device)
            return converted

        super()._apply(convert, recurse)  # type: ignore[no-untyped-call]
        dtype = next(self.get_parameter(name).dtype for name, slot in self.program.slots() if is_compute(slot))
        if dtype != self._dtype:
            self._dtype = dtype
            for bound in self._bound.values():
                bound.rebind(dtype)
        return self

    # Running ------------------------------------------------------------------------------------------------------

    @torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator]
    def forward(
        self, *, labels: Tensor | None = None, num_items_in_batch: Tensor | int | None = None, **batch: Any
    ) -> CausalLMOutputWithPast:
        """
        Args:
            labels: (batch, sequence) token ids; -100 is ignored. The shift by one place is done here.
            num_items_in_batch: Divides the summed loss, for gradient accumulation; None averages over the labels.
            **batch: The processor's output.

        Returns:
            `.loss` when labels are given, `.logits` (batch, sequence, vocabulary).

        Raises:
            BatchError: The batch contradicts itself; the message names the sample.
        """
        compiler = swap_compiler(None)
        try:
            self.check_names("model", batch)
            checked = batch if labels is None else {**batch, "labels": labels}
            prepared = self.family.prepare(checked, self.config, self.processor)
            return self._forward(prepared, batch["input_ids"].shape, labels, num_items_in_batch, compiler)
        finally:
            swap_compiler(compiler)

    def forward_prepared(self, prepared: HostBatch, shape: torch.Size, labels: Tensor | None) -> CausalLMOutputWithPast:
        """`forward` after the host prologue: what runs on the device, eagerly. `shape` is that of input_ids."""
        return self._forward(prepared, shape, labels, None, None)

    def _forward(
        self,
        prepared: HostBatch,
        shape: torch.Size,
        labels: Tensor | None,
        items: Tensor | int | None,
        compiler: Compiler,
    ) -> CausalLMOutputWithPast:
        variant = self.program.variants[prepared.variant]
        tensors = {name: tensor.to(self.device, non_blocking=True) for name, tensor in prepared.tensors.items()}
        logits = self._run(variant, tensors, compiler).squeeze(0)
        loss = None if labels is None else self._loss(logits, labels, prepared.places, items)
        return CausalLMOutputWithPast(loss=loss, logits=_unpack(logits, prepared.places, shape))

    def _loss(self, logits: Tensor, labels: Tensor, places: Tensor, items: Tensor | int | None) -> Tensor:
        """Cross-entropy of every token's successor in its own row, as transformers has it. A padding place predicts
        nothing here (transformers lets the last place of left padding predict the first token)."""
        following = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:].flatten()
        chosen = following[places.to(labels.device)].to(logits.device)
        count = torch.as_tensor(items) if isinstance(items, int) else items
        loss: Tensor = ForCausalLMLoss(logits, None, logits.shape[-1], count, shift_labels=chosen)
        return loss

    def _run(self, variant: Variant, values: dict[str, Tensor], compiler: Compiler) -> Tensor:
        """Call the regions in order; a value is let go after its last reader."""
        checkpointing = self.checkpointing and self.training and torch.is_grad_enabled()
        last = {name: number for number, call in enumerate(variant.calls) for name in call.inputs}
        for number, call in enumerate(variant.calls):
            arguments = tuple(values[name] for name in call.inputs)
            for name in set(call.inputs):
                if last[name] == number:
                    del values[name]
            results = self._call(call, compiler, arguments, checkpointing)
            del arguments
            values.update(zip(call.outputs, results, strict=True))
            del results
        return values[variant.output]

    def _call(
        self, call: Call, compiler: Compiler, arguments: tuple[Tensor, ...], checkpointing: bool
    ) -> tuple[Tensor, ...]:
        if not call.instance:
            return self._bound[call.region](self, compiler, arguments)
        instance = self.get_submodule(call.instance)
        results: tuple[Tensor, ...]
        if checkpointing:
            results = checkpoint(instance, compiler, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            results = instance(compiler, *arguments)
        return results

    # transformers' conventions --------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype."""
        return self._dtype

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None) -> None:
        """Keep only the inputs of every block for backward, and compute the rest again. Options are not needed."""
        self.checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        """Keep all activations."""
        self.checkpointing = False

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether blocks are computed again in backward."""
        return self.checkpointing

    def trainable_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name, parameter) of everything that takes a gradient."""
        return ((name, parameter) for name, parameter in self.named_parameters() if parameter.requires_grad)


def unwrap(model: nn.Module) -> VisionLanguageModel:
    """The model itself, also of a compiled one.

    Raises:
        UsageError: It is not a vlmbuild model.
    """
    inner = getattr(model, "_orig_mod", model)
    if not isinstance(inner, VisionLanguageModel):
        raise UsageError(f"Expected a model from vlmbuild.load, got {type(model).__name__}.")
    return inner


def _unpack(logits: Tensor, places: Tensor, shape: torch.Size) -> Tensor:
    """Packed logits (tokens, vocabulary) as (batch, sequence, vocabulary); zero at padding."""
    if len(places) == shape.numel():
        return logits.view(*shape, -1)
    padded = logits.new_zeros(shape.numel(), logits.shape[-1])
    return padded.index_copy(0, places.to(logits.device), logits).view(*shape, -1)


def _module_at(root: nn.Module, path: str) -> nn.Module:
    """The module at a path; missing ones on the way are made."""
    module = root
    for part in path.split(".") if path else ():
        if part not in module._modules:
            module.add_module(part, nn.Module())
        module = module._modules[part]  # type: ignore[assignment]
    return module
