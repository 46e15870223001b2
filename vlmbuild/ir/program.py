"""The intermediate representation: variants that call regions, regions whose parameters are inputs.

A `Program` is independent of weights, of the device, and of the compute dtype: it is captured in bfloat16, so that every
cast is visible, and a bfloat16 literal in a graph means "the dtype the model computes in" (`COMPUTE_DTYPE`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch._guards import detect_fake_mode
from torch.fx import GraphModule, Node

from vlmbuild.formats import WeightFormat
from vlmbuild.ir.dims import Dim, Shape, parse_shape, shape_names
from vlmbuild.ir.schema import Role as Role  # noqa: PLC0414  (exported)
from vlmbuild.ir.schema import SlotKind as SlotKind  # noqa: PLC0414  (exported)

COMPUTE_DTYPE = torch.bfloat16
"""In graphs and slots, the dtype that is chosen when the program is bound to weights."""


@dataclass(frozen=True, slots=True)
class Slot:
    """A parameter that a region takes as an input.

    Attributes:
        name: Relative to the instance, for example "self_attn.q_proj.weight".
        shape: Static sizes.
        dtype: `COMPUTE_DTYPE` for weights that follow the compute dtype.
        kind: "parameter" is trainable, "buffer" is stored but not trained, "constant" follows from the config.
        role: Function of the tensor in the model; quantization depends on it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    kind: SlotKind
    role: Role


@dataclass(frozen=True, slots=True)
class WeightRecipe:
    """The stored format of a source tensor of every instance. Slots without a recipe are stored as they are.

    Attributes:
        source: Relative name of the tensor in the source checkpoint.
        shape: Shape of the source tensor, (out features, in features).
        format: Stored format.
    """

    source: str
    shape: tuple[int, ...]
    format: WeightFormat


class SourceWeight(NamedTuple):
    """A weight of the source and its stored format.

    Attributes:
        name: Name of the tensor; of a region's weight, relative to the instance.
        shape: Shape in the source.
        format: Stored format; None keeps the tensor as it is.
    """

    name: str
    shape: tuple[int, ...]
    format: WeightFormat | None


@dataclass(slots=True)
class Region:
    """One graph and the instances that share it. Placeholders are the slots in order, then the activations.

    Attributes:
        name: Name, for example "language_model.layers".
        graph: A `GraphModule` without parameters of its own.
        slots: One per leading placeholder.
        instances: Module paths ("model.language_model.layers.7"); "" for the parts between repeated blocks.
        activations: Shapes of the activations; sizes that change from batch to batch are `Dim`s.
        recipes: Formats of source tensors that are not stored as they are.
        dimensions: Symbol in the graph's shapes -> name of the program's dimension.
    """

    name: str
    graph: GraphModule
    slots: tuple[Slot, ...]
    instances: tuple[str, ...]
    activations: tuple[Shape, ...]
    recipes: tuple[WeightRecipe, ...] = ()
    dimensions: dict[str, str] = field(default_factory=dict)

    def placeholders(self) -> list[Node]:
        """Return the graph's placeholders: the slots in order, then the activations."""
        return [node for node in self.graph.graph.nodes if node.op == "placeholder"]

    def results(self) -> list[Node]:
        """Return the nodes that the graph returns."""
        return returned_nodes(self.graph)

    def slot_nodes(self) -> dict[Node, Slot]:
        """Map each slot's placeholder to the slot."""
        return dict(zip(self.placeholders()[: len(self.slots)], self.slots, strict=True))

    def source_weights(self) -> Iterator[SourceWeight]:
        """Yield the weights of an instance: those with a recipe, then the other parameters."""
        yield from (SourceWeight(recipe.source, recipe.shape, recipe.format) for recipe in self.recipes)
        converted = {recipe.source for recipe in self.recipes}
        for slot in self.slots:
            if slot.kind == "parameter" and slot.name not in converted:
                yield SourceWeight(slot.name, slot.shape, None)

    def add_slot(self, slot: Slot) -> Node:
        """Append a slot; returns its placeholder."""
        placeholders = self.placeholders()
        anchor = placeholders[len(self.slots)]
        with self.graph.graph.inserting_before(anchor):
            node = self.graph.graph.placeholder(f"slot_{slot.name.replace('.', '_')}")
        mode = detect_fake_mode([other.meta.get("val") for other in placeholders])
        with mode if mode is not None else nullcontext():
            node.meta["val"] = torch.empty(slot.shape, dtype=slot.dtype, device="meta")
        self.slots += (slot,)
        return node

    def remove_slot(self, node: Node) -> None:
        """Remove the slot of a placeholder that nothing uses any more."""
        index = self.placeholders().index(node)
        self.slots = self.slots[:index] + self.slots[index + 1 :]
        self.graph.graph.erase_node(node)


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a region by a variant; values are named as in static single assignment."""

    region: str
    instance: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Input:
    """An input of a variant. Sizes that change from batch to batch are `Dim`s; texts such as "4*merged" are parsed."""

    name: str
    dtype: torch.dtype
    shape: Shape

    def __init__(self, name: str, dtype: torch.dtype, shape: Iterable[int | str | Dim]) -> None:
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "dtype", dtype)
        object.__setattr__(self, "shape", parse_shape(shape))

    def fixed_size(self, axis: int) -> int:
        """Return a size that no batch changes."""
        size = self.shape[axis]
        assert isinstance(size, int), self.name
        return size

    def is_about_tokens(self) -> bool:
        """Return whether a dimension counts tokens or samples; every other input is about images."""
        return not TOKEN_DIMENSIONS.isdisjoint(shape_names([self.shape]))


TOKEN_DIMENSIONS = frozenset({"sequence", "samples", "batch", "new", "past", "length"})
"""Names of sizes that depend on the text."""


@dataclass(frozen=True, slots=True)
class Variant:
    """A straight line of region calls, for one kind of batch ("image": with images, "text": without).

    Attributes:
        inputs: Named inputs.
        calls: Calls in order.
        output: Name of the logits.
        presents: Names of the other values that it returns: the grown key-value cache.
    """

    inputs: tuple[Input, ...]
    calls: tuple[Call, ...]
    output: str
    presents: tuple[str, ...] = ()

    def image_values(self) -> tuple[str, ...]:
        """Return the names of values that depend on images alone and that tokens read, in order."""
        from_images = {entry.name for entry in self.inputs if not entry.is_about_tokens()}
        computed: dict[str, None] = {}
        read: set[str] = set()
        for call in self.calls:
            if from_images.issuperset(call.inputs):
                from_images.update(call.outputs)
                computed.update(dict.fromkeys(call.outputs))
            else:
                read.update(call.inputs)
        return tuple(name for name in computed if name in read)


@dataclass(frozen=True, slots=True)
class Rotary:
    """A rotary position embedding that appears in the model.

    Attributes:
        head_dim: Channels of a head; half of them are angles.
        sections: Angles per position axis. Text has one or three axes, a vision tower two.
        shared: Each axis starts again at the first frequency, and the tower rotates in float32; else the axes split one
            range of frequencies, and states are rotated in the compute dtype.
        scaling: Factor on cosines and sines (YaRN, arXiv:2309.00071, section 3.4).
        interleaved: The axes take turns, frequency by frequency, instead of having ranges.
    """

    head_dim: int
    sections: tuple[int, ...]
    shared: bool
    scaling: float = 1.0
    interleaved: bool = False


@dataclass(frozen=True, slots=True)
class Geometry:
    """The numbers of a model that passes may use; never the family's name."""

    rotary: tuple[Rotary, ...]


@dataclass(slots=True)
class Program:
    """A captured model.

    Attributes:
        family: Key of `vlmbuild.families.FAMILIES`, for the host prologue and the config.
        geometry: Numbers for passes.
        variants: Variants by name.
        regions: Regions by name, shared by the variants.
        ties: Alias of a parameter -> the name that holds it ("lm_head.weight" of a tied model).
    """

    family: str
    geometry: Geometry
    variants: dict[str, Variant]
    regions: dict[str, Region]
    ties: dict[str, str] = field(default_factory=dict)

    def slots(self) -> Iterator[tuple[str, Slot]]:
        """Yield (absolute name, slot) for every distinct tensor, in the order of the regions and their instances."""
        seen = set()
        for region in self.regions.values():
            for instance in region.instances:
                for slot in region.slots:
                    name = join(instance, slot.name)
                    if name not in seen:
                        seen.add(name)
                        yield name, slot

    def source_weights(self) -> Iterator[SourceWeight]:
        """Yield every distinct weight by its absolute name, in the order of the regions and their instances."""
        seen = set()
        for region in self.regions.values():
            for instance in region.instances:
                for weight in region.source_weights():
                    name = join(instance, weight.name)
                    if name not in seen:
                        seen.add(name)
                        yield weight._replace(name=name)


def returned_nodes(graph_module: GraphModule) -> list[Node]:
    """Return the nodes that a graph returns, one or several."""
    returned: Any = graph_module.graph.output_node().args[0]
    return [returned] if isinstance(returned, Node) else list(returned)


def needed_nodes(results: Collection[Node], known: Collection[Node] = ()) -> set[Node]:
    """Return the nodes that compute the results from the known nodes, results included and known nodes excluded."""
    needed: set[Node] = set()
    waiting = [node for node in results if node not in known]
    while waiting:
        node = waiting.pop()
        if node not in needed:
            needed.add(node)
            waiting += [other for other in node.all_input_nodes if other not in known]
    return needed


def join(instance: str, name: str) -> str:
    """Make the absolute name of an instance's slot."""
    return f"{instance}.{name}" if instance else name
