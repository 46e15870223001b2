"""Running of a bound program's variant: its regions in order, then the head, for logits or for a loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from vlmbuild.families import PackedBatch
from vlmbuild.ir.interpret import run_calls
from vlmbuild.ir.program import Call, join
from vlmbuild.runtime.compiler import Compiler
from vlmbuild.runtime.decode_steps import padded_rows
from vlmbuild.runtime.torch.loss import IGNORED, labelled_rows, summed_cross_entropy
from vlmbuild.runtime.torch.program_model import ProgramModel
from vlmbuild.runtime.torch.sharding import check_same_variant, gather_unreached


@dataclass(frozen=True, slots=True)
class Execution:
    """One batch on one model.

    Attributes:
        model: Bound to weights.
        prepared: The batch, after the host prologue.
        shape: Shape of input_ids, (batch, sequence).
        compiler: Callback of a surrounding `torch.compile`, or None.
    """

    model: ProgramModel
    prepared: PackedBatch
    shape: torch.Size
    compiler: Compiler = None

    def hidden(self) -> Tensor:
        """Return the head's input (tokens, hidden), packed. Values are freed after their last reader."""
        check_same_variant(self.model, self.prepared.variant)
        gather_unreached(self.model)
        device = self.model.device
        values = {name: tensor.to(device, non_blocking=True) for name, tensor in self.prepared.tensors.items()}
        run_calls(self._calls()[:-1], values, self._call)
        return values[self._head().inputs[0]].squeeze(0)

    def logits(self, hidden: Tensor, keep: int = 0) -> Tensor:
        """Return logits (batch, sequence, vocabulary) of packed hidden states; only of the last `keep` positions if not 0."""
        if self.model.get_output_embeddings().has_hooks:
            return self._hooked_logits(self.unpack(hidden)[:, -keep:])
        if not keep:
            (logits,) = self._call(self._head(), (hidden.unsqueeze(0),))
            return self.unpack(logits.squeeze(0))
        last = self.unpack(hidden)[:, -keep:]
        (logits,) = self._call(self._head(), (last.flatten(0, 1).unsqueeze(0),))
        return logits.view(*last.shape[:2], -1)

    def loss(self, hidden: Tensor, labels: Tensor, items: Tensor | int | None) -> Tensor:
        """Return the cross-entropy of every token's successor in its row, divided by the number of labels or by `items`.

        Padding predicts nothing here, where in transformers the last position of left padding predicts the first token.
        """
        rows, targets = (x.to(hidden.device) for x in labelled_rows(labels, self.prepared.index))
        region = self.model.bound[self._head().region]
        if self.model.get_output_embeddings().has_hooks:
            whole = self._hooked_logits(self.unpack(hidden)).flatten(0, 1)
            logits = whole[self.prepared.index.to(hidden.device)[rows]]
            total = summed_cross_entropy(lambda _, states: states, (), logits, targets, self.model.vocabulary)
        else:
            total = summed_cross_entropy(
                lambda tensors, states: region.run(tensors, self.compiler, (states,), self.model.training)[0],
                region.tensors_of(self.model),
                hidden[rows],
                targets,
                self.model.vocabulary,
            )
        total = total + self._unused()
        count = (targets != IGNORED).sum().clamp(min=1) if items is None else items
        return total / (count.to(total.device) if isinstance(count, Tensor) else count)

    def unpack(self, rows: Tensor) -> Tensor:
        """Return packed rows (tokens, width) as (batch, sequence, width), zero at padding."""
        return padded_rows(rows, self.prepared, 0, self.shape).view(*self.shape, -1)

    def _calls(self) -> tuple[Call, ...]:
        return self.model.program.variants[self.prepared.variant].calls

    def _head(self) -> Call:
        return self._calls()[-1]

    def _call(self, call: Call, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return self.model.run_call(call, self.model.bound[call.region], self.compiler, arguments, self._embed)

    def _embed(self, ids: Tensor, padding_idx: int) -> Tensor:
        """Call the module of embeddings as transformers does, with rows of ids; ids of padding are zero."""
        rows = self.unpack(ids.flatten().unsqueeze(1)).squeeze(-1)
        embeddings: Tensor = self.model.get_input_embeddings()(rows, padding_idx=padding_idx)
        return embeddings.flatten(0, 1)[self.prepared.index.to(ids.device)].unsqueeze(0)

    def _hooked_logits(self, hidden: Tensor) -> Tensor:
        """Call the head's module as transformers does, with rows of hidden states (batch, sequence, hidden)."""

        def run(states: Tensor) -> Tensor:
            (logits,) = self._call(self._head(), (states.flatten(0, 1).unsqueeze(0),))
            return logits.view(*states.shape[:-1], -1)

        logits: Tensor = self.model.get_output_embeddings()(hidden, run=run)
        return logits

    def _unused(self) -> Tensor | float:
        """Return zero as a function of every trainable parameter that this variant does not use.

        All processes then average the same gradients, even if some have no image in their batch. (All processes of a sharded
        model have the same variant.)
        """
        if not (torch.distributed.is_available() and torch.distributed.is_initialized() and torch.is_grad_enabled()):
            return 0.0
        if isinstance(self.model, FSDPModule):
            return 0.0
        program = self.model.program
        used = {join(call.instance, slot.name) for call in self._calls() for slot in program.regions[call.region].slots}
        unused = (p for name, p in self.model.trainable_parameters() if name not in used)
        return sum((parameter.sum() * 0 for parameter in unused), start=0.0)
