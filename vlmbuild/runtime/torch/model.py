"""The trainable model: a module tree with transformers' parameter names whose blocks share one graph each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch._dynamo.decorators import skip
from torch.distributed.fsdp import FSDPModule

from vlmbuild.errors import IncompatibleError, UsageError
from vlmbuild.families import Family, PackedBatch
from vlmbuild.ir.linear_layers import linear_sites
from vlmbuild.ir.program import Program, Slot
from vlmbuild.kv_cache.program import cached_inputs
from vlmbuild.recipe import DTYPES
from vlmbuild.runtime.compiler import Compiler, swap_compiler
from vlmbuild.runtime.hf import CausalLMOutputWithPast, TrainingOutput, check_names
from vlmbuild.runtime.key_value_cache import KeyValueCache
from vlmbuild.runtime.torch.adapted import AdaptedModel
from vlmbuild.runtime.torch.conventions import Backbone
from vlmbuild.runtime.torch.decoding import Decoding
from vlmbuild.runtime.torch.execution import Execution
from vlmbuild.runtime.torch.modules import module_at, tensor_at
from vlmbuild.runtime.torch.region import BoundRegion, RegionInstance, carried_activations, is_compute
from vlmbuild.util.validation import cast_finite


class VisionLanguageModel(AdaptedModel):
    """A program bound to weights.

    `model(**processor_batch, labels=labels)` gives `.loss` and `.logits`; `model.generate(**processor_batch, ...)` is
    transformers' own generation. Under `torch.compile` each distinct region compiles once, for all instances, batch
    shapes and image sizes.
    """

    def __init__(
        self, program: Program, family: Family, config: Any, tensors: Mapping[str, Tensor], dtype: torch.dtype
    ) -> None:
        """
        Args:
            program: After its passes.
            family: Family of the program.
            config: Config of transformers.
            tensors: Every slot of kind "parameter" or "buffer" by module name; constants come from the family.
            dtype: The compute dtype.
        """
        super().__init__(config)
        self.program = program
        self.family = family
        self.processor = None
        self.path = None
        self.artifact_id = None
        self.vocabulary = _vocabulary(program)
        self._dtype = dtype
        self.bound = {}
        self._cached = {}
        self._bind_regions()
        constants = family.constants(config)
        for name, slot in program.slots():
            self.set_tensor(name, slot, constants[name] if slot.kind == "constant" else tensors[name])
        self.tie_weights()

    # Tensors ------------------------------------------------------------------------------------------------------

    def set_tensor(self, name: str, slot: Slot, tensor: Tensor) -> None:
        """Register a slot's tensor under its name; floating weights follow the compute dtype."""
        path, _, leaf = name.rpartition(".")
        owner = module_at(self, path)
        dtype = self._dtype if is_compute(slot) else slot.dtype
        if tensor.is_meta:
            tensor = tensor.to(dtype)
        elif tensor.dtype != dtype:  # as stored, it stays mapped and unread
            tensor = cast_finite(tensor, dtype, name, DTYPES, IncompatibleError)
        if slot.kind == "parameter":
            owner.register_parameter(leaf, nn.Parameter(tensor))
        else:
            owner.register_buffer(leaf, tensor, persistent=slot.kind == "buffer")

    def _bind_regions(self) -> None:
        """Bind every region of the program, and make modules for the instances that have none."""
        self._cached.clear()
        self.bound.clear()
        for name, region in self.program.regions.items():
            carried = carried_activations(region, self.program.variants)
            self.bound[name] = BoundRegion(region, self._dtype, carried)
            for instance in region.instances:
                path, _, leaf = instance.rpartition(".")
                parent = module_at(self, path)
                if leaf and leaf not in parent._modules:
                    parent.add_module(leaf, RegionInstance())
                if leaf:
                    parent.get_submodule(leaf).region = name  # type: ignore[assignment]
        self._weights = [
            (name, module_at(self, name.rpartition(".")[0]), name.rpartition(".")[2])
            for name, slot in self.program.slots()
            if is_compute(slot)
        ]
        self.set_adapter_disabled(self._adapter_disabled)
        self.register_dropout()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Convert for `.to`, `.half`, `.cuda`, ...; tensors with their own dtype (frequencies, scales, adapters) keep it."""
        fixed = {tensor_at(self, name) for name, slot in self.program.slots() if not is_compute(slot)}

        def convert(tensor: Tensor) -> Tensor:
            converted = fn(tensor)
            if tensor in fixed and converted.dtype != tensor.dtype:
                return tensor.to(converted.device)
            return converted

        super()._apply(convert, recurse)  # type: ignore[no-untyped-call]
        dtype = next(self.get_parameter(name).dtype for name, slot in self.program.slots() if is_compute(slot))
        if dtype != self._dtype:
            self._dtype = dtype
            self._bind_regions()
        return self

    # Running ------------------------------------------------------------------------------------------------------

    @skip  # as torch.compiler.disable(recursive=False), which fails while any thread runs torch.export
    def forward(
        self,
        *,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        past_key_values: KeyValueCache | None = None,
        logits_to_keep: int = 0,
        **batch: Any,
    ) -> CausalLMOutputWithPast | TrainingOutput:
        """
        Args:
            labels: (batch, sequence) token ids; -100 is ignored. They are shifted by one position here.
            num_items_in_batch: Divisor of the summed loss, for gradient accumulation; None averages over the labels.
            past_key_values: Cache from `new_cache`, which receives the batch's keys and values. Once it has some, `input_ids`
                are the following tokens, and `attention_mask` covers all.
            logits_to_keep: Number of last tokens per row that get logits; 0 is all. No effect with labels.
            **batch: Output of the processor.

        Returns:
            `.logits` (batch, sequence, vocabulary), and `.loss` with labels.

        Raises:
            BatchError: The batch contradicts itself; the message names the sample.
            UsageError: There are labels and a cache.
        """
        if past_key_values is not None and labels is not None:
            raise UsageError(
                "A loss needs the whole text, and past_key_values holds a part of it. Leave past_key_values or labels out."
            )
        compiler = swap_compiler(None)  # before anything that a compiler would look into
        try:
            with self._own_precision():
                if past_key_values is not None:
                    check_names(self.family, "model", batch)
                    logits = Decoding(self, past_key_values, logits_to_keep, compiler).logits(batch)
                    return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)
                execution = self._execution(batch, labels, compiler)
                hidden = execution.hidden()
                if labels is None:
                    return CausalLMOutputWithPast(logits=execution.logits(hidden, logits_to_keep))
                loss = execution.loss(hidden, labels, num_items_in_batch)
                if not self.training:
                    return CausalLMOutputWithPast(loss=loss, logits=execution.logits(hidden))
                eager = replace(execution, compiler=None)  # one product: not worth a compilation
                return TrainingOutput(loss=loss).with_logits(lambda: self._late_logits(eager, hidden))
        finally:
            swap_compiler(compiler)

    def _late_logits(self, execution: Execution, hidden: Tensor) -> Tensor:
        with self._own_precision():
            return execution.logits(hidden)

    def _own_precision(self) -> AbstractContextManager[None]:
        """Turn autocast off for smaller dtypes, whose graphs have their own casts; it is for float32 weights."""
        if self._dtype == torch.float32:
            return nullcontext()
        off: AbstractContextManager[None] = torch.autocast(self.device.type, enabled=False)
        return off

    def follow_weights(self) -> None:
        """Compute in the dtype that others have given to all weights (`peft.prepare_model_for_kbit_training`).

        Raises:
            UsageError: They have given it to some.
        """
        if isinstance(self, FSDPModule):
            return  # its mixed precision keeps weights in another dtype than it gathers
        dtypes: dict[torch.dtype, str] = {}
        for name, owner, leaf in self._weights:
            tensor = owner._parameters.get(leaf)
            dtypes.setdefault((owner._buffers[leaf] if tensor is None else tensor).dtype, name)  # type: ignore[union-attr]
        if len(dtypes) > 1:
            (one, name), (other, second) = list(dtypes.items())[:2]
            raise UsageError(
                f"{name} is {one} and {second} is {other}, but a graph computes in one dtype. Convert the whole model with "
                "model.to(dtype)."
            )
        if (dtype := next(iter(dtypes))) != self._dtype:
            self.to(dtype)

    def _execution(self, batch: dict[str, Any], labels: Tensor | None, compiler: Compiler) -> Execution:
        """Check a trainer's batch, and run the host prologue."""
        check_names(self.family, "model", batch)
        self.follow_weights()
        self.follow_dropout()
        checked = batch if labels is None else {**batch, "labels": labels}
        prepared = self.family.prepare(checked, self.config, self.processor)
        self.family.compare_positions(batch, self.config)
        return Execution(self, prepared, batch["input_ids"].shape, compiler)

    def new_cache(self, length: int | None = None) -> KeyValueCache:
        return KeyValueCache(cached_inputs(self.cached("dynamic").program.variants["text"]), length)

    def forward_prepared(self, prepared: PackedBatch, shape: torch.Size, labels: Tensor | None) -> Tensor:
        """Run the part of `forward` after the host prologue, eagerly. `shape` is the shape of input_ids.

        Returns:
            The loss with labels, else the logits.
        """
        execution = Execution(self, prepared, shape)
        hidden = execution.hidden()
        return execution.logits(hidden) if labels is None else execution.loss(hidden, labels, None)

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """Buffers that DistributedDataParallel does not broadcast before every forward pass: stored ones (quantized weights,
        scales) and constants are equal in all processes."""
        return [name for name, _ in self.named_buffers()]

    @property
    def base_model(self) -> Backbone:  # type: ignore[override]
        """The model without its head: called with a batch, it returns `.last_hidden_state` (batch, sequence, hidden)."""

        def hidden_states(batch: dict[str, Any]) -> Tensor:
            compiler = swap_compiler(None)
            try:
                with self._own_precision():
                    execution = self._execution(batch, None, compiler)
                    return execution.unpack(execution.hidden())
            finally:
                swap_compiler(compiler)

        return Backbone(hidden_states, self.get_output_embeddings())


def unwrap(model: nn.Module) -> VisionLanguageModel:
    """Return the model itself, also from one that is compiled or wrapped for several processes.

    Raises:
        UsageError: It is not a vlmbuild model.
    """
    inner: Any = model
    while not isinstance(inner, VisionLanguageModel):
        wrapped = getattr(inner, "_orig_mod", None) or getattr(inner, "module", None)
        if wrapped is None:
            break
        inner = wrapped
    if not isinstance(inner, VisionLanguageModel):
        raise UsageError(
            f"Expected a model from vlmbuild.load, got {type(model).__name__}. Load one, or pass the wrapped model."
        )
    return inner


def _vocabulary(program: Program) -> int:
    """Return the number of logits per token."""
    head = program.regions[next(iter(program.variants.values())).calls[-1].region]
    return linear_sites(head)[-1].shape[0]
