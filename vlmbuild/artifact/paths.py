"""The rules for file paths in an artifact: each means the same one file on every system."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable
from typing import Final

from vlmbuild.artifact.canonical import is_text
from vlmbuild.errors import IntegrityError

MANIFEST_NAME: Final = "manifest.json"
SUMS_NAME: Final = "SHA256SUMS"
GENERATION_CONFIG: Final = "generation_config.json"
MAX_PATH_BYTES: Final = 255

# Device names of Windows, and what git and hubs keep for themselves.
_RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?|\.git.*", re.IGNORECASE)
_OWN_NAMES = (MANIFEST_NAME.casefold(), SUMS_NAME.casefold())


def check_path(path: object) -> str:
    """Return the path if it is a plain relative POSIX path that means the same file on every system.

    Raises IntegrityError naming the path and the rule that it breaks.
    """
    if not isinstance(path, str):
        raise IntegrityError(f"The file path {path!r} is not a string. Build the artifact again.")
    reason = next((reason for reason, broken in _PATH_RULES if broken(path)), None)
    reason = reason or next(filter(None, map(_component_problem, path.split("/"))), None)
    if reason:
        raise IntegrityError(f"The file path {path!r} is refused: {reason}. Rename the file, then build again.")
    return path


# In order: a later rule may rely on an earlier one.
_PATH_RULES: Final[tuple[tuple[str, Callable[[str], bool]], ...]] = (
    ("it is empty", lambda path: not path),
    ("it holds a lone surrogate", lambda path: not is_text(path)),
    (f"it is longer than {MAX_PATH_BYTES} bytes", lambda path: len(path.encode()) > MAX_PATH_BYTES),
    ("it is absolute", lambda path: path.startswith("/")),
    ("it holds a backslash or a colon", lambda path: "\\" in path or ":" in path),
    ("it holds a control or invisible character", lambda path: any(map(_is_invisible, path))),
    ("it is not in Unicode normal form NFC", lambda path: unicodedata.normalize("NFC", path) != path),
    ("the name belongs to the artifact itself", lambda path: path.split("/")[0].casefold() in _OWN_NAMES),
)


def _component_problem(component: str) -> str | None:
    if component in ("", ".", ".."):
        return f"it has the component {component!r}"
    if component != component.strip(" ") or component.endswith("."):
        return f"the component {component!r} begins or ends with a space, or ends with a dot"
    if _RESERVED.fullmatch(component):
        return f"the component {component!r} is a reserved name"
    return None


def _is_invisible(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cf", "Zl", "Zp")


def check_collisions(paths: Iterable[str]) -> None:
    """Raise IntegrityError when two paths are one file, or a file and a folder, where case does not count."""
    spelled: dict[str, tuple[str, bool]] = {}
    for path in paths:
        parts = path.split("/")
        for length in range(1, len(parts) + 1):
            here = ("/".join(parts[:length]), length == len(parts))
            other = spelled.setdefault(unicodedata.normalize("NFC", here[0].casefold()), here)
            # The same folder may come again; a file may not, and neither may another spelling.
            if other is not here and (other != here or here[1]):
                raise IntegrityError(
                    f"The file paths {other[0]!r} and {here[0]!r} collide on a file system that ignores case, or name "
                    "both a file and a folder. Rename one of them, then build again."
                )
