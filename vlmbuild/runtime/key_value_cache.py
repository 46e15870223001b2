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
        """Of the tokens so far."""
        return self.keys, self.values

    def keep(self, keys: Tensor, values: Tensor) -> None:
        """Those of the tokens so far and of new ones."""
        self.keys, self.values = keys, values
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True


class BlockBuffers(BlockCache):
    """Keys and values in buffers, of which the first `tokens` are written.

    Args:
        length: Room for so many tokens; None is as much as there are, and more when it is asked for.
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
        """Have a place for one token more; where there is none, get `room` places."""
        if self.tokens == self.keys.shape[2]:
            super().keep(*(_with_room(x, self.tokens + room) for x in (self.keys, self.values)))

    def get_seq_length(self) -> int:
        return self.tokens

    def crop(self, tokens_to_remove: int) -> None:
        self.tokens = min(self.tokens, tokens_to_remove) if tokens_to_remove > 0 else self.tokens + tokens_to_remove


def _with_room(held: Tensor, length: int) -> Tensor:
    """A buffer of this length that begins with what is held; the rest is zero, since what is masked is multiplied by zero."""
    buffer = held.new_zeros((*held.shape[:2], length, held.shape[3]))
    buffer[:, :, : held.shape[2]] = held
    return buffer


class KeyValueCache(Cache):
    """Keys and values of every decoder block, and what else the next token needs.

    Beams reorder it, assisted decoding crops it, and generation goes on from one that `generate` returned
    (`return_dict_in_generate=True`) when it is passed as `past_key_values` with the longer text.

    Attributes:
        length: How many tokens a static cache has room for; None is a cache that grows.
        room: So many places a growing cache gets at once, and single tokens are written into them; with 0 there are none, and
            the keys and values of every step are concatenated.
        variant: Of the program, that runs the next tokens; None before the prompt.
        copies: How many rows each sample of the prompt gets, for beams and for several answers.
        positions: int64 (batch,), the position of every row's next token.
        images: What the next tokens read of the images, by input name; never changed.
        rows: What a new token takes over from its row's last prompt token, by input name: (batch, ...).
        media: Shapes of the prompt's images, by the processor's names.
    """

    def __init__(self, inputs: Iterable[Input], length: int | None = None, room: int = 0) -> None:
        """
        Args:
            inputs: Of a program with a growing cache: its cached keys and values, in pairs.
            length: Of a static cache.
            room: Of one that grows.
        """
        self.inputs = tuple(inputs)
        self.length, self.room = length, room
        self.blocks = [BlockBuffers(length) if self.in_place else BlockCache() for _ in self.inputs[::2]]
        super().__init__(layers=list(self.blocks))
        self.variant: str | None = None
        self.copies = 1
        self.positions = torch.zeros(0, dtype=torch.int64)
        self.images: dict[str, Tensor] = {}
        self.rows: dict[str, Tensor] = {}
        self.media: dict[str, torch.Size] = {}

    def past(self, batch: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """Keys and values so far, by input name: (batch, heads, tokens, head dim); none, of this kind, before the prompt."""
        found: dict[str, Tensor] = {}
        for block, key, value in self._blocks():
            if block.is_initialized:
                found[key.name], found[value.name] = block.past()
            else:
                sizes = (batch, int(key.shape[1]), 0, int(key.shape[3]))
                found[key.name] = found[value.name] = torch.empty(sizes, dtype=dtype, device=device)
        return found

    def keep(self, presents: dict[str, Tensor]) -> None:
        """Take keys and values so far, by input name, in the place of the former ones."""
        for block, key, value in self._blocks():
            block.keep(presents[key.name], presents[value.name])

    @property
    def in_place(self) -> bool:
        """Whether single tokens are written into buffers."""
        return self.length is not None or self.room > 0

    def buffers(self) -> dict[str, Tensor]:
        """Whole buffers by input name, with a place for the next token unless a static cache is full."""
        found: dict[str, Tensor] = {}
        for block, key, value in self._blocks():
            assert isinstance(block, BlockBuffers)
            if self.length is None:
                block.make_room(self.room)
            found[key.name], found[value.name] = block.keys, block.values
        return found

    def advance(self) -> None:
        """A token was written into the buffers."""
        for block in self.blocks:
            assert isinstance(block, BlockBuffers)
            block.tokens += 1

    def _blocks(self) -> Iterator[tuple[BlockCache, Input, Input]]:
        return zip(self.blocks, self.inputs[::2], self.inputs[1::2], strict=True)

    # What transformers asks -----------------------------------------------------------------------------------------

    def reorder_cache(self, beam_idx: Any) -> None:
        """Let row i be what row `beam_idx[i]` was."""
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
        """Forget the last tokens: as many as a negative number says, or those after a positive number of them."""
        before = self.get_seq_length()
        super().crop(tokens_to_remove)
        self.positions = self.positions - (before - self.get_seq_length())

    def _choose(self, indices: Tensor) -> None:
        self.positions = self.positions[indices.to(self.positions.device)]
        self.rows = {name: tensor[indices.to(tensor.device)] for name, tensor in self.rows.items()}
