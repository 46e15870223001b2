"""Processors whose `apply_chat_template` is transformers' own, in the sandbox with limits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from types import FunctionType, SimpleNamespace
from typing import Any

import transformers
from transformers.processing_utils import ProcessorMixin
from transformers.utils.chat_template_utils import render_jinja_template

from vlmbuild.errors import IncompatibleError
from vlmbuild.families.chat import compiled_template, refusals, template_names
from vlmbuild.families.chat_sandbox import rendering
from vlmbuild.families.derived_class import derive

_METHODS = ("apply_chat_template", "_prepare_processor_kwargs")
"""Methods of transformers that compile a template; not every supported version has the second."""


def limit_templates(processor: Any) -> Any:
    """Make a processor's `apply_chat_template` render within limits; its class keeps its name. Returns the processor.

    Raises:
        IncompatibleError: This version of transformers renders chats by other functions.
    """
    base: Any = type(processor)
    processor.__class__ = _limited(base)
    return processor


@lru_cache
def _limited(base: type) -> type:
    """Derive the class from a processor's."""
    render = _with_names(render_jinja_template, {"_compile_jinja_template": _Template})
    ours = {"render_jinja_template": render, "_get_template_variables": template_names}
    methods = {name: getattr(ProcessorMixin, name) for name in _METHODS if hasattr(ProcessorMixin, name)}
    if missing := ours.keys() - {name for method in methods.values() for name in method.__code__.co_names}:
        raise _other_version(missing)
    return derive(base, {name: _with_names(method, ours) for name, method in methods.items()}, _limited)


def _with_names(function: Any, names: Mapping[str, Any]) -> Callable[..., Any]:
    """Copy a function of transformers that finds other values under names of its module."""
    code = function.__code__
    if not names.keys() & set(code.co_names):
        raise _other_version(names)
    values = {**function.__globals__, **names}
    copied = FunctionType(code, values, function.__name__, function.__defaults__, function.__closure__)
    copied.__kwdefaults__, copied.__doc__ = function.__kwdefaults__, function.__doc__
    return copied


def _other_version(names: Iterable[str]) -> IncompatibleError:
    return IncompatibleError(
        f"transformers {transformers.__version__} renders chats without {', '.join(names)}, so they cannot be limited. "
        "Install a version of transformers that vlmbuild requires."
    )


class _Template:
    """A compiled template, in the form that transformers uses it."""

    def __init__(self, template: str) -> None:
        self._compiled = compiled_template(template)
        self.environment = SimpleNamespace(activate_tracker=rendering.tracking)

    def render(self, **values: Any) -> str:
        with refusals():
            return self._compiled.render(values)

    def generate(self, **values: Any) -> Iterator[str]:
        with refusals():
            yield from self._compiled.generate(values)
