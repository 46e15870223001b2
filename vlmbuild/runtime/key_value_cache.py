"""The key-value cache of a generation, as transformers' generation handles it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicLayer

from vlmbuild.ir.program import Input


class BlockCache(DynamicLayer):
    """Keys and values of one block, (batch, heads, tokens, head dim); transformers reorders, crops and repeats them."""

    keys: Any
    values: Any

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def past(self) -> tuple[Tensor, Tensor]:
        """Return keys and values of the tokens so far."""
        return self.keys, self.values

    def keep(self, keys: Tensor, values: Tensor) -> None:
        """Replace them by keys and values of the tokens so far and of new ones."""
        self.keys, self.values = keys, values
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True


class BlockBuffers(BlockCache):
    """Keys and values in buffers whose first `tokens` positions are written.

    Args:
        length: Tokens that there is room for; None makes room as it is needed.
    """

    def __init__(self, length: int | None) -> None:
        super().__init__()
        self.length = length
        self.tokens = 0

    def past(self) -> tuple[Tensor, Tensor]:
        return self.keys[:, :, : self.tokens], self.values[:, :, : self.tokens]

    def keep(self, keys: Tensor, values: Tensor) -> None:
        old, self.tokens = self.tokens, keys.shape[2]
        if self.length is None:
            super().keep(keys, values)
            return
        if not self.is_initialized:
            super().keep(*(_with_room(x, self.length) for x in (keys, values)))
        self.keys[:, :, old : self.tokens] = keys[:, :, old:]
        self.values[:, :, old : self.tokens] = values[:, :, old:]

    def make_room(self, room: int) -> None:
        """Make room for `room` more tokens if there is none for one."""
        if self.length is None and self.tokens == self.keys.shape[2]:
            super().keep(*(_with_room(x, self.tokens + room) for x in (self.keys, self.values)))

    def get_seq_length(self) -> int:
        return self.tokens

    def crop(self, tokens_to_remove: int) -> None:
        self.tokens = min(self.tokens, tokens_to_remove) if tokens_to_remove > 0 else self.tokens + tokens_to_remove


def _with_room(tensor: Tensor, length: int) -> Tensor:
    """Copy keys or values into a longer buffer. The rest is zero, since masked values are multiplied by zero."""
    buffer = tensor.new_zeros((*tensor.shape[:2], length, tensor.shape[3]))
    buffer[:, :, : tensor.shape[2]] = tensor
    return buffer


class KeyValueCache(Cache):
    """Keys and values of every decoder block, and everything else that the next token needs.

    Beams reorder it, and assisted decoding crops it. Generation continues from a cache that `generate` returned
    (`return_dict_in_generate=True`) when it is passed as `past_key_values` with the longer text.

    Attributes:
        length: Tokens that a static cache has room for; None for a dynamic cache.
        room: Tokens by which a dynamic cache grows at once, to write single tokens in place; 0 concatenates at every step.
        variant: Variant of the program that runs the next tokens; None before the prompt.
        copies: Rows per sample of the prompt, for beams and for several answers.
        positions: int64 (batch,), the position of every row's next token.
        images: Inputs of the next tokens that depend on images alone, by name; never changed.
        rows: Inputs that a new token takes from its row's last prompt token, by name: (batch, ...).
        media: Shapes of the prompt's images, by the processor's names.
    """

    def __init__(self, inputs: Iterable[Input], length: int | None = None, room: int = 0) -> None:
        """
        Args:
            inputs: Cached keys and values of a program with a dynamic cache, in pairs.
            length: Tokens of a static cache; None makes a dynamic one.
            room: Tokens by which a dynamic cache grows at once.
        """
        self.inputs = tuple(inputs)
        self.length, self.room = length, room
        self._buffers = [BlockBuffers(length) for _ in self.inputs[::2]] if self.in_place else []
        self.blocks: list[BlockCache] = [*self._buffers] or [BlockCache() for _ in self.inputs[::2]]
        super().__init__(layers=list(self.blocks))
        self.variant: str | None = None
        self.copies = 1
        self.positions = torch.zeros(0, dtype=torch.int64)
        self.images: dict[str, Tensor] = {}
        self.rows: dict[str, Tensor] = {}
        self.media: dict[str, torch.Size] = {}

    def past(self, batch: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """Return keys and values so far, by input name: (batch, heads, tokens, head dim); empty ones before the prompt."""
        self.convert(dtype)
        tensors: dict[str, Tensor] = {}
        for block, key, value in self._blocks():
            if block.is_initialized:
                tensors[key.name], tensors[value.name] = block.past()
            else:
                sizes = (batch, key.fixed_size(1), 0, key.fixed_size(3))
                tensors[key.name] = tensors[value.name] = torch.empty(sizes, dtype=dtype, device=device)
        return tensors

    def convert(self, dtype: torch.dtype) -> None:
        """Convert keys and values to another dtype: autocast may have been on when they were computed, and be off now."""
        for block in self.blocks:
            if block.is_initialized and block.keys.dtype != dtype:
                block.keys, block.values, block.dtype = block.keys.to(dtype), block.values.to(dtype), dtype

    def keep(self, presents: dict[str, Tensor]) -> None:
        """Replace keys and values by these, by input name."""
        for block, key, value in self._blocks():
            block.keep(presents[key.name], presents[value.name])

    @property
    def in_place(self) -> bool:
        """True if single tokens are written into buffers."""
        return self.length is not None or self.room > 0

    def buffers(self) -> dict[str, Tensor]:
        """Return whole buffers by input name, with room for the next token unless a static cache is full."""
        for block in self._buffers:
            block.make_room(self.room)
        return {
            entry.name: tensor
            for block, key, value in self._blocks()
            for entry, tensor in ((key, block.keys), (value, block.values))
        }

    def advance(self) -> None:
        """Count a token that was written into the buffers."""
        for block in self._buffers:
            block.tokens += 1

    def _blocks(self) -> Iterator[tuple[BlockCache, Input, Input]]:
        return zip(self.blocks, self.inputs[::2], self.inputs[1::2], strict=True)

    # Called by transformers -----------------------------------------------------------------------------------------

    def reorder_cache(self, beam_idx: Any) -> None:
        """Replace row i by row `beam_idx[i]`."""
        super().reorder_cache(beam_idx)
        self._choose(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        super().batch_select_indices(indices)
        self._choose(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        super().batch_repeat_interleave(repeats)
        self._choose(torch.arange(len(self.positions)).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens: as many as a negative number says, or all after a positive number of them."""
        before = self.get_seq_length()
        super().crop(tokens_to_remove)
        self.positions = self.positions - (before - self.get_seq_length())

    def _choose(self, indices: Tensor) -> None:
        self.positions = self.positions[indices.to(self.positions.device)]
        self.rows = {name: tensor[indices.to(tensor.device)] for name, tensor in self.rows.items()}
