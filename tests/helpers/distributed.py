"""Worker script of runtime/torch/test_distributed.py under torchrun, and its single-process counterpart.

python -m torch.distributed.run --standalone --nproc-per-node 2 distributed.py ARTIFACT OUTPUT CASE...
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from tiny import make_batch
from torch import distributed
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

import vlmbuild
from vlmbuild.errors import BatchError
from vlmbuild.runtime.torch.region import RegionInstance

IMAGES = [[[5, (1, 4, 6), 7]], [[1, (1, 8, 8), 2]], [[6, (1, 4, 4), 3]], [[2, (1, 2, 2), 8]]]
MIXED = [[[5, (1, 4, 6), 7]], [[5], [9]], [[6, (1, 4, 4), 3]], [[7]]]
LOOPS = {
    "ddp": (MIXED, {"wrap": "ddp"}),
    "fsdp": (IMAGES, {"wrap": "fsdp", "checkpointing": True, "compiled": True}),
    "fsdp in bfloat16": (IMAGES, {"wrap": "fsdp in bfloat16"}),
    "accelerate fsdp": (IMAGES, {"wrap": "accelerate", "checkpointing": True}),
}


def torchrun(artifact, output, *cases):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = Path(__file__)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(script.parents[2])}
    done = subprocess.run(
        [*command, script, artifact, output, *cases], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]


def record(directory):
    return json.loads((directory / "record.json").read_text())


def ready(layouts):
    return [{**batch, "labels": labels} for batch, labels in map(make_batch, layouts)]


def adapted(artifact):
    torch.manual_seed(0)
    model, _ = vlmbuild.load(artifact)
    vlmbuild.add_lora(model.train(), r=4, vision=True)
    return model


def loop(model, batches, rank=0, world=1, steps=3):
    """AdamW on the union of all processes' batches: every loss is divided by the labels of all processes, and multiplied by
    their number, since DDP and FSDP average gradients."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    labels = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    losses = []
    for _ in range(steps):
        total = torch.zeros(())
        for batch in batches[rank::world]:
            loss = model(**batch, num_items_in_batch=labels).loss
            (loss * world).backward()
            total += loss.detach()
        if world > 1:
            distributed.all_reduce(total)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(total))
    return losses


def wrapped_loop(artifact, output, case):
    layouts, options = LOOPS[case]
    rank, world = distributed.get_rank(), distributed.get_world_size()
    model = adapted(artifact)
    if options.get("checkpointing"):
        model.gradient_checkpointing_enable()
    if options["wrap"] == "ddp":
        model = DistributedDataParallel(model)
    elif options["wrap"] == "fsdp in bfloat16":
        vlmbuild.shard(model.bfloat16(), mp_policy=MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32))
    elif options["wrap"] == "accelerate":
        model = accelerates_fsdp2(model)
    else:
        vlmbuild.shard(model)
    if options.get("compiled"):
        model.compile(backend="eager")
    record = {"losses": loop(model, ready(layouts)[:2], rank, world), "held": held(model)}
    model(**ready([[[5]], [[7]]])[rank]).loss.backward()  # no process has an image, and vision adapters are trained
    model.zero_grad()
    vlmbuild.save_adapter(model, output)
    if options["wrap"] != "ddp":
        record["refusal"] = refusal(model, ready(MIXED)[rank])
    return record


def accelerates_fsdp2(model):
    """Wrap a model as `Accelerator.prepare` does on GPUs; on a CPU it takes DDP, whatever its configuration says."""
    accelerator = Accelerator(cpu=True)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
    )
    accelerator.state.fsdp_plugin = plugin
    model = fsdp2_prepare_model(accelerator, model)
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    assert {module for module in model.modules() if isinstance(module, RegionInstance)} < set(sharded)
    assert model.get_input_embeddings() in sharded
    return model


def held(model):
    """Count the bytes of parameters and buffers in this process."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum((tensor.to_local() if hasattr(tensor, "to_local") else tensor).nbytes for tensor in tensors)


def refusal(model, batch):
    try:
        model(**batch)
    except BatchError as error:
        return str(error)
    return None


def train(artifact, output, world):
    """Train two batches per step in all, through transformers' Trainer, which takes DDP by itself."""
    arguments = TrainingArguments(
        str(output),
        max_steps=3,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2 // world,
        save_steps=3,
        logging_steps=1,
        report_to="none",
        remove_unused_columns=False,
        learning_rate=1e-2,
        disable_tqdm=True,
        use_cpu=True,
        train_sampling_strategy="sequential",
    )
    callbacks = [vlmbuild.TrainingCallback()]
    trainer = Trainer(adapted(artifact), arguments, lambda batches: batches[0], ready(MIXED), callbacks=callbacks)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "losses": [entry["loss"] for entry in entries],
        "tokens": [entry["num_input_tokens_seen"] for entry in entries],
    }


def main(artifact, output, *cases):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    for case in cases:
        directory = Path(output) / case
        if case in LOOPS:
            record = wrapped_loop(artifact, directory, case)
        else:
            record = train(artifact, directory, distributed.get_world_size())
        if os.environ["RANK"] == "0":
            (directory / "record.json").write_text(json.dumps(record))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
