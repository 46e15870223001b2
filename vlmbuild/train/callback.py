"""For transformers' and TRL's trainers: the training log, and beside every checkpoint the adapter in PEFT's format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from vlmbuild.runtime.torch.model import unwrap
from vlmbuild.train.log import TrainingLog
from vlmbuild.train.lora import save_adapter


class TrainingCallback(TrainerCallback):
    """`Trainer(model, ..., callbacks=[vlmbuild.TrainingCallback()])`.

    An entry is made whenever the trainer logs a loss (`logging_steps`). Tokens are those of all processes, without padding;
    samples are what the trainer's batch sizes say. A checkpoint directory of a model with an adapter is also an adapter that
    PEFT and `vlmbuild.load_adapter` read.

    Args:
        log: Where entries go; None prints them.
    """

    def __init__(self, log: TrainingLog | None = None) -> None:
        self.log = TrainingLog() if log is None else log
        self._seen = (0, 0)

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Have the trainer count tokens, unless it does already."""
        if args.include_num_input_tokens_seen in (False, "no"):
            args.include_num_input_tokens_seen = "non_padding"

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock, also when training goes on from a checkpoint."""
        self._seen = (state.global_step, int(state.num_input_tokens_seen))
        self.log.start()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Make an entry of a training loss, on the first process."""
        logs = kwargs.get("logs") or {}
        if "loss" not in logs or not state.is_world_process_zero:
            return
        (step, tokens), self._seen = self._seen, (state.global_step, int(state.num_input_tokens_seen))
        samples = (
            (state.global_step - step) * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        )
        self.log.step(self._seen[1] - tokens, logs["loss"], samples, state.global_step)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the adapter into the checkpoint; in all processes, since its parameters may be sharded."""
        if unwrap(kwargs["model"]).adapter is not None:
            save_adapter(kwargs["model"], Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
