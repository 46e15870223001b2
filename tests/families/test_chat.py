"""Chat templates: what transformers writes, within limits; hostile templates end soon, with a message."""

from __future__ import annotations

import copy
import time
from types import SimpleNamespace

import pytest
from processors import photographs
from samples import in_parts
from setups import PROCESSORS
from transformers.processing_utils import ProcessorMixin

from vlmbuild.errors import BatchError, UsageError
from vlmbuild.families import FAMILIES
from vlmbuild.families.chat import question_batch, render_chat, template_names
from vlmbuild.families.chat_sandbox import LENGTH
from vlmbuild.zoo import CHECKPOINTS, ZOO

TEXT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello, <b>you</b>."}]
PARTS = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"x": ["ü", 1, None, True]}}}]


stock = ProcessorMixin.apply_chat_template


def with_template(template):
    tokenizer = SimpleNamespace(special_tokens_map={"eos_token": "</s>"})
    return SimpleNamespace(chat_template=template, tokenizer=tokenizer)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("messages", [TEXT, PARTS, PARTS + TEXT[1:] + TEXT[:1]])
def test_published_and_packaged_templates_write_what_transformers_writes(name, messages):
    packaged = [FAMILIES[name].processor(ZOO[CHECKPOINTS[name]])] if name in CHECKPOINTS else []
    for processor in (PROCESSORS[name](), *packaged):
        for prompt in (False, True):
            expected = stock(processor, in_parts(messages), add_generation_prompt=prompt)
            assert render_chat(processor, messages, add_generation_prompt=prompt) == expected


LANGUAGE = """
{%- macro part(x, sep=', ') -%}{{ x | join(sep) }}{%- endmacro -%}
{%- set ns = namespace(found=false, n=0) -%}
{%- for m in messages if m.role != 'tool' -%}
  {%- set ns.n = ns.n + loop.index0 * 2 ** 3 -%}
  {%- if loop.last %}[last]{% elif loop.first %}[first {{ loop.length }}]{% endif -%}
  {%- if m.content is string -%}{{ (m['role'] ~ ': ' + m.content) | trim | replace('l', 'L') | upper }}
  {%- else -%}{{ m.content | selectattr('type', 'equalto', 'text') | map(attribute='text') | list | tojson(indent=2) }}
  {%- endif -%}
  {%- if loop.index > 5 -%}{%- break -%}{%- endif -%}
{%- endfor %}
{% generation %}{{ part(['a', 'b']) }}{% endgeneration %} {{ ns.n }} {{ '%s|%5d' % ('x', 7) }} {{ '{:>4}'.format(eos_token) }}
{%- set block %}{{ tools | tojson }}{% endset -%}{{ block }}{{ (tools or []) | length }}{{ dict(a=1) | dictsort }}{{ none }}{{ [1, 'b', {}] }}
{{ undefined_name }}{{ messages[1:] | map(attribute='role') | join('/') }}{{ 'a,b'.split(',')[-1].strip() }}
"""


@pytest.mark.parametrize("tools", [None, TOOLS])
def test_the_language_of_templates_means_the_same(tools):
    processor = copy.copy(PROCESSORS["mllama"]())
    processor.chat_template = LANGUAGE
    assert render_chat(processor, PARTS + TEXT, tools=tools) == stock(processor, PARTS + TEXT, tools=tools)


DOUBLED = "{% set ns = namespace(x='ab') %}{% for _ in range(99) %}{% set ns.x = "


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'x' * 10**10 }}",
        "{{ 10**10 * 'x' }}",
        "{{ [1] * 10**10 }}",
        "{{ 10**(10**10) }}",
        "{{ 'x'.ljust(10**10) }}",
        "{{ 'x'.center(10**10) }}",
        "{{ ('\t' * 10**6).expandtabs(10**6) }}",
        "{{ '%10000000000d' % 1 }}",
        "{{ '%*d' % (10**10, 1) }}",
        "{{ '{:>10000000000}'.format(1) }}",
        "{{ '{:>{}}'.format(1, 10**10) }}",
        "{{ (1).to_bytes(10**10, 'big') }}",
        "{{ ('x' * 10**6).replace('x', 'y' * 10**6) }}",
        "{{ ('x' * 10**6) | replace('x', 'y' * 10**6) }}",
        "{{ ('y' * 10**6).join('x' * 10**6) }}",
        "{{ range(10**5) | join('y' * 10**6) }}",
        "{{ 'x' | center(10**10) }}",
        "{{ [1] | tojson(indent=10**9) }}",
        "{{ 'x' | indent(10**9) }}",
        "{{ [1] | batch(10**9, 0) | list }}",
        DOUBLED + "ns.x ~ ns.x %}{% endfor %}",
        DOUBLED + "ns.x + ns.x %}{% endfor %}",
        DOUBLED + "[ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
        DOUBLED + "{'a': ns.x, 'b': ns.x} %}{% endfor %}{{ ns.x | tojson }}",
        DOUBLED + "ns.x %}{% set a %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = a %}{% endfor %}",
        "{% for _ in range(10**5) %}{% for _ in range(10**5) %}{% endfor %}{% endfor %}",
        "{% for _ in range(10**5) %}{{ 'x' * 1000 }}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ lipsum(n=10**6) }}",
        "{{ range(10**9) | list }}",
    ],
)
def test_templates_that_would_take_gigabytes_or_hours_are_refused(template):
    started = time.process_time()
    with pytest.raises(BatchError, match="The chat template refuses the messages"):
        render_chat(with_template(template), TEXT)
    assert time.process_time() - started < 30  # not hours


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ namespace(__init__=1) }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ 'x'.translate({120: 'y'}) }}",
        "{% include 'other' %}",
        "{{ raise_exception('Only users speak.') }}",
        "{% for %}",
    ],
)
def test_what_a_template_may_not_do_is_refused(template):
    with pytest.raises((BatchError, UsageError), match="chat template"):
        render_chat(with_template(template), TEXT)


def test_a_long_conversation_is_within_the_limits():
    messages = [{"role": role, "content": "word " * 2000} for _ in range(200) for role in ("user", "assistant")]
    written = render_chat(PROCESSORS["qwen2_vl"](), messages)
    assert 4_000_000 < len(written) < LENGTH


def test_the_template_is_chosen_by_name_and_missing_ones_are_named():
    several = with_template({"default": "plain", "tool_use": "tools"})
    assert render_chat(several, TEXT) == "plain"
    assert render_chat(several, TEXT, tools=TOOLS) == "tools"
    for missing in (None, "", {"other": "x"}):
        with pytest.raises(UsageError, match="no chat template"):
            render_chat(with_template(missing), TEXT)


def test_names_that_a_template_reads():
    assert "add_vision_id" in template_names(PROCESSORS["qwen2_vl"]().chat_template)
    assert "date_string" in template_names("{% if not date_string is defined %}{% set date_string = 1 %}{% endif %}")
    assert "found" not in template_names(PROCESSORS["mllama"]().chat_template)


def test_a_question_becomes_the_processors_batch():
    processor, photo = PROCESSORS["qwen2_vl"](), photographs()["chelsea"]
    batch = question_batch(processor, "What?", [photo])
    text = processor.apply_chat_template(PARTS, add_generation_prompt=True)
    expected = processor(text=[text], images=[photo], return_tensors="pt")
    assert batch.keys() == set(expected)
    assert all((batch[key] == expected[key]).all() for key in batch)
    plain = copy.copy(processor)
    plain.chat_template = None
    assert processor.tokenizer.decode(question_batch(plain, "What?")["input_ids"][0]) == "What?"
