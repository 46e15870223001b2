"""Classes that are derived from a processor's when it is loaded, and pass for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def derive(base: type, members: Mapping[str, Any], again: Callable[[type], type]) -> type:
    """Derive a class with other members and the base's name, which `save_pretrained` writes.

    Args:
        base: The class.
        members: Members by name.
        again: Function of a module that returns this class for `base`: instances are pickled by both, since no module knows
            a class that is made here.
    """
    return type(
        base.__name__,
        (base,),
        {
            "__module__": base.__module__,
            "__doc__": base.__doc__,
            "__reduce_ex__": lambda self, _: (_instance, (again, base), self.__dict__),
            **members,
        },
    )


def _instance(again: Callable[[type], type], base: type) -> Any:
    made: Any = again(base)
    return made.__new__(made)
