"""A callback for transformers' and TRL's trainers: adapters of sharded models, and more figures in their log."""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.utils import counters
from torch.distributed.fsdp import FSDPModule
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from vlmbuild.runtime.torch.model import unwrap
from vlmbuild.train.lora import save_adapter


class TrainingCallback(TrainerCallback):
    """`Trainer(model, ..., callbacks=[vlmbuild.TrainingCallback()])`.

    A checkpoint of a sharded model gets its adapter, as trainers write that of a model on one device. Each entry of the
    trainer's log gets these figures, beside the trainer's own:

    - `num_input_tokens_seen`, `train_tokens_per_second`: the trainer's, switched on; of all processes, without padding.
    - `peak_memory`: bytes that this process has used at most; on a GPU allocated by torch, on a CPU resident.
    - `compilations`: graphs that torch.compile has compiled in this process.
    """

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Make the trainer count tokens, unless it does already."""
        if args.include_num_input_tokens_seen in (False, "no"):
            args.include_num_input_tokens_seen = "non_padding"

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add figures to an entry with a training loss; the trainer prints it, and reports it, after this."""
        logs = kwargs.get("logs") or {}
        if "loss" in logs:
            figures = {"peak_memory": peak_memory(), "compilations": counters["stats"]["unique_graphs"]}
            logs.update(figures)
            state.log_history[-1].update(figures)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the adapter of a sharded model into the checkpoint, in all processes; the trainer writes others itself."""
        model = unwrap(kwargs["model"])
        if model.adapter is not None and isinstance(model, FSDPModule):
            save_adapter(kwargs["model"], Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")


def peak_memory() -> int:
    """Return the most bytes that this process has used: allocated by torch on the GPU, or resident on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
