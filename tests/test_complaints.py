"""What users of other tools complain of most: each is impossible here, or refused with a message that says what to do."""

from __future__ import annotations

import copy
import shutil

import processors
import pytest
import torch
from processors import photographs
from samples import one_image, text_only, turn, two_images

from vlmbuild import VisionDataCollator
from vlmbuild.errors import BatchError, UsageError
from vlmbuild.families import FAMILIES, family_of_processor
from vlmbuild.zoo import ZOO

PROCESSORS = {"qwen2_vl": processors.qwen2_vl, "mllama": processors.mllama, "pixtral": processors.pixtral}


@pytest.fixture(params=PROCESSORS)
def processor(request):
    return PROCESSORS[request.param]()


def test_complaint_1_image_tokens_differ_from_features_by_truncation(processor):
    """Whatever max_length: every image has all its tokens, or the sample is refused by name."""
    example = two_images()
    media = torch.tensor(sorted(family_of_processor(processor).media_tokens(processor)))
    whole = VisionDataCollator(processor)([example])
    wanted = int(torch.isin(whole["input_ids"], media).sum())
    length = whole["input_ids"].shape[1]
    limits = [*range(1, length, max(1, length // 40)), length - 1, length]
    refused = 0
    for max_length in limits:
        try:
            batch = VisionDataCollator(processor, max_length=max_length)([example])
        except BatchError as error:
            assert 'Sample 0 ("Compare with")' in str(error)
            assert "Raise max_length" in str(error)
            refused += 1
            continue
        assert int(torch.isin(batch["input_ids"], media).sum()) == wanted
        assert batch["input_ids"].shape[1] <= max_length
    assert 0 < refused < len(limits) - 1


def test_complaint_2_pixel_limits_are_ignored():
    for name, size in (("qwen2_vl", {"longest_edge": 100 * 28 * 28}), ("pixtral", {"longest_edge": 160})):
        processor = PROCESSORS[name]()
        collator = VisionDataCollator(processor, size=size)
        own, lower = VisionDataCollator(processor)([one_image("retina")]), collator([one_image("retina")])
        tokens = int(torch.isin(lower["input_ids"], collator.media).sum())
        assert tokens <= 110 < int(torch.isin(own["input_ids"], collator.media).sum())
        assert collator.measure(one_image("retina")).tokens == lower["input_ids"].numel()
        with pytest.raises(UsageError, match="longest_edge must be from 1 to .*the limit of the processor"):
            VisionDataCollator(processor, size={"longest_edge": processor.image_processor.size["longest_edge"] + 1})
    with pytest.raises(UsageError, match="shortest_edge .* above longest_edge"):
        VisionDataCollator(processors.qwen2_vl(), size={"longest_edge": 3000})
    with pytest.raises(UsageError, match=r"Limits that can: none: Llama 3\.2 Vision"):
        VisionDataCollator(processors.mllama(), size={"height": 112})


def test_complaint_11_mixed_and_text_only_batches(processor):
    collator = VisionDataCollator(processor)
    text = collator([text_only(), text_only("Hi.", "Hello.")])
    assert not {key for key in text if key.startswith(("pixel", "image", "aspect", "cross"))}
    for order in ([text_only(), one_image(), two_images()], [two_images(), text_only(), one_image()]):
        batch = collator(order)
        for row, example in enumerate(order):
            alone, length = collator([example]), int(batch["attention_mask"][row].sum())
            assert torch.equal(batch["input_ids"][row, :length], alone["input_ids"][0])
            assert torch.equal(batch["labels"][row, :length], alone["labels"][0])
    for images, found in (([], 0), ([photographs()["tall"]] * 3, 3)):
        with pytest.raises(BatchError, match=f"Sample 1 .*has 2 image placeholders .* {found} images"):
            collator([text_only(), {**two_images(), "images": images}])


def test_complaint_13_processor_or_chat_template_lost(processor, tmp_path):
    with pytest.raises(UsageError, match="Expected the processor that vlmbuild.load returns"):
        VisionDataCollator(processor.tokenizer)
    bare = copy.copy(processor)
    bare.chat_template = None
    with pytest.raises(UsageError, match=r"no chat template.*vlmbuild\.load"):
        VisionDataCollator(bare)
    processor.save_pretrained(tmp_path)
    again = FAMILIES[family_of_processor(processor).name].processor(tmp_path)
    first, second = VisionDataCollator(processor)([two_images()]), VisionDataCollator(again)([two_images()])
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_complaint_13_artifacts_keep_the_template(nf4, tmp_path):
    from vlmbuild import load

    _, processor = load(nf4.path)
    assert processor.chat_template == (ZOO["qwen2-vl-digits"] / "chat_template.jinja").read_text()
    VisionDataCollator(processor)([text_only()])
    shutil.copytree(nf4.path, tmp_path / "copy")
    (tmp_path / "copy" / "chat_template.jinja").unlink()
    with pytest.raises(Exception, match=r"chat_template\.jinja"):
        load(tmp_path / "copy")


def test_complaint_14_loss_on_responses_only(processor):
    """Also where the question and the answer say the same, and where the answer looks like a prompt."""
    collator = VisionDataCollator(processor)
    again = "assistant\nWhat is this?"
    example = {"messages": [turn("user", photographs()["tall"], again), turn("assistant", again)]}
    batch = collator([example, text_only()])
    said = processor.tokenizer.decode(batch["labels"][0][batch["labels"][0] != -100])
    assert said.startswith(again)
    assert said.count(again) == 1
    labelled = (batch["labels"] != -100).nonzero()
    assert labelled[labelled[:, 0] == 0, 1].min() > torch.isin(batch["input_ids"][0], collator.media).nonzero().max()
    assert not torch.isin(batch["labels"], collator.media).any()
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()


def test_complaint_10_dtype_mismatch(nf4):
    """Whatever dtype is loaded and whatever autocast is around it: a step works, and adapters stay in float32."""
    import tiny

    from vlmbuild import add_lora, load

    batch, labels = tiny.make_batch([[5, (1, 4, 6), 7], [9]])
    losses = []
    for dtype in ("float32", "bfloat16", "float16"):
        model, _ = load(nf4.path, dtype=dtype)
        add_lora(model.train(), r=4, vision=True)
        for autocast in (None, torch.bfloat16, torch.float16):
            with torch.autocast("cpu", autocast, enabled=autocast is not None):
                loss = model(**batch, labels=labels).loss
            loss.backward()
            losses.append(float(loss))
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        assert all(p.dtype == torch.float32 and p.grad.isfinite().all() for p in trained)
        assert any(p.grad.any() for p in trained)
    assert losses == pytest.approx([losses[0]] * 9, rel=0.02)


def test_complaint_12_processes_with_and_without_images(nf4, tmp_path):
    """One process has a text-only batch while adapters of the vision tower are trained: nothing hangs, nothing differs."""
    import distributed
    from test_distributed import record, torchrun

    torchrun(nf4.path, tmp_path, "ddp")
    kinds = ["pixel_values" in batch for batch in distributed.ready(distributed.MIXED)[:2]]
    assert kinds == [True, False]
    expected = distributed.loop(distributed.adapted(nf4.path), distributed.ready(distributed.MIXED)[:2])
    assert record(tmp_path / "ddp")["losses"] == pytest.approx(expected, rel=1e-5)
