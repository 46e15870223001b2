"""How much memory a model needs to load, to infer and to train, measured on tensors without data.

The model that `vlmbuild.load` makes is built on the meta device, runs forward and backward as it does with data, and the
bytes of every storage are counted from its making to its end. All sizes are in bytes.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from vlmbuild.errors import UsageError
from vlmbuild.families import Family, ImageCost, PackedBatch
from vlmbuild.ir.dims import evaluate_shape
from vlmbuild.ir.program import Input, Program
from vlmbuild.ops import WORKSPACES
from vlmbuild.runtime.torch.checkpointing import Checkpointing
from vlmbuild.runtime.torch.model import VisionLanguageModel
from vlmbuild.train.lora import add_lora
from vlmbuild.util.validation import one_of

DEVICES = ("cuda", "cpu")
_META = torch.device("meta")
_LARGEST = 10_000_000
_OPTIMIZER_STATES = 2
"""AdamW keeps a mean of the gradients and one of their squares."""


@dataclass(frozen=True, slots=True)
class Workload:
    """The batch and the adapter that memory is estimated for.

    Attributes:
        batch: Samples; they are equal, so that nothing is padded.
        text_tokens: Tokens of each sample, besides those of its images.
        rank: Rank of the LoRA adapter.
        device: Device of the model, "cuda" or "cpu"; decides the workspaces of kernels.

    Raises:
        UsageError: A number is not positive, or the device is another one.
    """

    batch: int = 1
    text_tokens: int = 256
    rank: int = 16
    device: str = "cuda"

    def __post_init__(self) -> None:
        one_of("device", self.device, DEVICES)
        for name, what in (("batch", "number of samples"), ("text_tokens", "number of tokens"), ("rank", "LoRA rank")):
            if type(getattr(self, name)) is not int or not 1 <= getattr(self, name) <= _LARGEST:
                raise UsageError(
                    f"{name} is {getattr(self, name)!r}, but memory can only be estimated for a positive {what}. Give 1 to "
                    f"{_LARGEST:,} (--{name.replace('_', '-')} on the command line)."
                )


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory of a model, in bytes.

    Attributes:
        workload: Batch and adapter.
        images: Images in each sample.
        tokens: Tokens of each sample, its images' included.
        load: The weights and constants, as they stay in memory once the model is loaded.
        adapter: LoRA's weights, in float32; their gradients take as much, and AdamW's states twice as much.
        infer_activations: Highest point of a forward pass without gradients, besides `load`; the logits of all tokens
            and the batch are part of it.
        train_activations: Highest point of forward and backward, besides weights, adapter, gradients and states.
        checkpointed_activations: The same with gradient checkpointing.
    """

    workload: Workload
    images: int
    tokens: int
    load: int
    adapter: int
    infer_activations: int
    train_activations: int
    checkpointed_activations: int

    @property
    def infer(self) -> int:
        """Bytes of a forward pass."""
        return self.load + self.infer_activations

    @property
    def training_state(self) -> int:
        """Bytes of adapter, gradients and AdamW's states."""
        return self.adapter * (2 + _OPTIMIZER_STATES)

    @property
    def train(self) -> int:
        """Bytes of a training step that keeps all activations."""
        return self.load + self.training_state + self.train_activations

    @property
    def train_checkpointed(self) -> int:
        """Bytes of a training step with gradient checkpointing."""
        return self.load + self.training_state + self.checkpointed_activations

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        parts = ("load", "adapter", "infer_activations", "train_activations", "checkpointed_activations")
        totals = ("infer", "train", "train_checkpointed")
        return {
            "batch": self.workload.batch,
            "text_tokens": self.workload.text_tokens,
            "rank": self.workload.rank,
            "device": self.workload.device,
            "images": self.images,
            "tokens": self.tokens,
            **{part: getattr(self, part) for part in parts},
            "gradients": self.adapter,
            "optimizer": _OPTIMIZER_STATES * self.adapter,
            **{total: getattr(self, total) for total in totals},
        }


def estimate_memory(
    program: Program,
    family: Family,
    config: Any,
    dtype: torch.dtype,
    images: Sequence[ImageCost] = (),
    workload: Workload = Workload(),
) -> Memory:
    """Estimate for a finished program. Consumes it (adds LoRA slots).

    Args:
        program: After the recipe's passes.
        family: The program's family.
        config: From `family.config`.
        dtype: The compute dtype.
        images: Patches and tokens of each sample's images.
        workload: The batch and the adapter.
    """
    model = _meta_model(program, family, config, dtype)
    sizes = family.batch_sizes(config, images, workload.batch, workload.text_tokens)
    variant = "image" if images else "text"
    step = _Step(model, variant, sizes, workload)
    load = _nbytes(model)
    infer = step.infer()
    add_lora(model, workload.rank)
    return Memory(
        workload=workload,
        images=len(images),
        tokens=sizes["sequence"] // workload.batch,
        load=load,
        adapter=_nbytes(model) - load,
        infer_activations=infer,
        train_activations=step.train(checkpointing=False),
        checkpointed_activations=step.train(checkpointing=True),
    )


def _meta_model(program: Program, family: Family, config: Any, dtype: torch.dtype) -> VisionLanguageModel:
    """Build the program's model with tensors that have a size and no data."""
    tensors = {name: torch.empty(slot.shape, dtype=slot.dtype, device=_META) for name, slot in program.slots()}
    return VisionLanguageModel(program, family, config, tensors, dtype).to(_META)


def _tensors(model: torch.nn.Module) -> Iterable[Tensor]:
    """Yield parameters, their gradients and buffers."""
    for parameter in model.parameters():
        yield parameter
        if parameter.grad is not None:
            yield parameter.grad
    yield from model.buffers()


def _nbytes(model: torch.nn.Module) -> int:
    """Count the bytes of all tensors, shared ones once."""
    return sum({id(t): t.nbytes for t in (*model.parameters(), *model.buffers())}.values())


@dataclass(frozen=True, slots=True)
class _Step:
    """A step of a model on a batch without data.

    Attributes:
        model: Model on the meta device.
        variant: Variant of the program.
        sizes: Name of every dimension of the variant's inputs -> size.
        workload: The batch.
    """

    model: VisionLanguageModel
    variant: str
    sizes: Mapping[str, int]
    workload: Workload

    def infer(self) -> int:
        """Measure the highest point, in bytes, of a forward pass without gradients."""
        self.model.eval()
        with torch.no_grad():
            return self._peak(lambda batch, ids: self.model.forward_prepared(batch(), ids.shape, None))

    def train(self, *, checkpointing: bool) -> int:
        """Measure the highest point, in bytes, of forward and backward.

        Gradients do not count: they exist already, as from the second of several accumulated steps on.
        """
        self.model.train().checkpointing = Checkpointing() if checkpointing else None
        for _, parameter in self.model.trainable_parameters():
            parameter.grad = torch.empty_like(parameter)
        return self._peak(self._forward_and_backward)

    def _forward_and_backward(self, batch: Callable[[], PackedBatch], ids: Tensor) -> None:
        self.model.forward_prepared(batch(), ids.shape, ids).backward()

    def _peak(self, run: Callable[[Callable[[], PackedBatch], Tensor], object]) -> int:
        """Measure the highest point of `run`, in bytes.

        `run` gets a function that makes a prepared batch, which the forward pass alone may hold, and labels (samples,
        tokens), one for every token. The program's inputs count, since the model brings them to its device.
        """
        ids = torch.zeros(self.workload.batch, self.sizes["sequence"] // self.workload.batch, dtype=torch.int64)
        positions = torch.arange(ids.numel())
        live = _LiveBytes(_tensors(self.model), self.workload.device)
        with live:
            # The host prologue needs data; its outputs have the same sizes.
            run(lambda: PackedBatch(self.variant, self._inputs(), positions), ids)
        return live.peak

    def _inputs(self) -> dict[str, Tensor]:
        return {entry.name: self._input(entry) for entry in self.model.program.variants[self.variant].inputs}

    def _input(self, entry: Input) -> Tensor:
        return torch.empty(evaluate_shape(entry.shape, self.sizes), dtype=entry.dtype, device=_META)


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that operators make until nothing refers to them, autograd included.

    Attributes:
        peak: Greatest number of bytes at once, workspaces of operators included.
    """

    def __init__(self, known: Iterable[Tensor], device: str) -> None:
        """
        Args:
            known: Tensors that exist before, and do not count.
            device: "cpu" or "cuda", for the workspaces of operators.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._device = device
        self._seen: dict[int, weakref.ref[Any]] = {}
        for tensor in known:
            self._watch(tensor.untyped_storage(), 0)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                if id(storage) not in self._seen:
                    self._watch(storage, storage.nbytes())
        formulas = (WORKSPACES[key] for key in (function, *function.tags) if key in WORKSPACES)
        self.peak = max(self.peak, self.live + sum(formula(args, result, self._device) for formula in formulas))
        return result

    def _watch(self, storage: torch.UntypedStorage, nbytes: int) -> None:
        key = id(storage)

        def gone(_: Any) -> None:
            self.live -= nbytes
            del self._seen[key]

        self.live += nbytes
        self._seen[key] = weakref.ref(storage, gone)
