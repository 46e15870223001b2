"""`apply_chat_template` of the processors that are loaded: transformers' own result, within limits, and nothing else changes."""

from __future__ import annotations

import copy
import json
import pickle

import jinja2
import pytest
from processors import photographs
from transformers.processing_utils import ProcessorMixin

from vlmbuild.errors import BatchError, IncompatibleError
from vlmbuild.families import FAMILIES
from vlmbuild.families.chat_processor import _with_names
from vlmbuild.zoo import CHECKPOINTS, ZOO

ASK = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}
ANSWER = {"role": "assistant", "content": [{"type": "text", "text": "A cat, I think"}]}
MARKED = """{%- for m in messages %}<{{ m.role }}>{% for p in m.content %}{% if p.type == 'image' %}IMAGE{% elif
m.role == 'assistant' %}{% generation %}{{ p.text }} {% endgeneration %}{% else %}{{ p.text }}{% endif %}{% endfor %}{% endfor %}"""
stock = ProcessorMixin.apply_chat_template


@pytest.fixture(scope="module", params=CHECKPOINTS)
def processor(request):
    return FAMILIES[request.param].processor(ZOO[CHECKPOINTS[request.param]])


def test_texts_and_batches_are_transformers_own(processor):
    for options in ({}, {"add_generation_prompt": True}, {"continue_final_message": True}):
        messages = [ASK, ANSWER] if "continue_final_message" in options else [ASK]
        for chat in (messages, [messages, [ASK, ANSWER]]):
            assert processor.apply_chat_template(chat, **options) == stock(processor, chat, **options)
    photo = photographs()["chelsea"]
    chat = [{**ASK, "content": [{"type": "image", "image": photo}, ASK["content"][1]]}]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    ours, theirs = (
        render(copy.deepcopy(chat), **options) for render in (processor.apply_chat_template, bound(processor))
    )
    assert ours.keys() == theirs.keys() and "pixel_values" in ours
    assert all((ours[name] == theirs[name]).all() for name in ours)


def bound(processor):
    return lambda *arguments, **options: stock(processor, *arguments, **options)


def test_the_assistants_text_is_masked_as_in_transformers():
    processor = FAMILIES["qwen2_vl"].processor(ZOO["qwen2-vl-digits"])
    template = MARKED.replace("IMAGE", "")
    chat = [{**ASK, "content": ASK["content"][1:]}, ANSWER, {**ASK, "content": ASK["content"][1:]}, ANSWER]
    options = {"chat_template": template, "tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    ours, theirs = (
        render(copy.deepcopy(chat), **options) for render in (processor.apply_chat_template, bound(processor))
    )
    assert ours["assistant_masks"] == theirs["assistant_masks"]
    assert 0 < sum(map(int, ours["assistant_masks"][0])) < len(ours["assistant_masks"][0])


def copies(processor):
    return processor, copy.copy(processor), copy.deepcopy(processor), pickle.loads(pickle.dumps(processor))


@pytest.mark.parametrize(
    "template", ["{{ 'x' * 10**10 }}", "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"]
)
def test_limits_hold_in_copies_too(processor, template):
    for each in copies(processor):
        for options in ({}, {"tokenize": True, "return_dict": True}):
            with pytest.raises(BatchError, match=r"chat template.*(8,388,608|500,000|steps)"):
                each.apply_chat_template(
                    [ANSWER], chat_template=template + "{% generation %}{% endgeneration %}", **options
                )


def test_a_templates_own_refusal_is_jinjas_error_too(processor):
    with pytest.raises(jinja2.TemplateError, match="roles must alternate"):
        processor.apply_chat_template([ASK], chat_template="{{ raise_exception('roles must alternate') }}")


def test_the_class_keeps_its_name_and_what_is_saved(processor, tmp_path):
    base = type(processor).__mro__[1]
    assert type(processor).__name__ == base.__name__ in FAMILIES[family_name(processor)].processors
    processor.save_pretrained(tmp_path / "ours")
    plain = copy.copy(processor)
    plain.__class__ = base
    plain.save_pretrained(tmp_path / "stock")
    files = sorted(path.name for path in (tmp_path / "stock").iterdir())
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == files
    for name in files:
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "stock" / name).read_bytes()
    saved = json.loads((tmp_path / "ours/processor_config.json").read_text())
    assert saved["processor_class"] == base.__name__


def family_name(processor):
    return next(name for name, family in FAMILIES.items() if type(processor).__name__ in family.processors)


def test_another_transformers_is_named():
    with pytest.raises(IncompatibleError, match="no_such_function"):
        _with_names(stock, {"no_such_function": None})
