"""Staging directories beside the output, their owners, and the one rename that publishes."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import re
import shutil
import socket
import sys
import uuid
from pathlib import Path

# The renameat2 flags of <linux/fs.h>.
_NOREPLACE, _EXCHANGE = 1, 2
_AT_FDCWD = -100
_UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM)


def create_staging(output: Path) -> Path:
    """Make the private directory `.<name>.staging-<owner>-<unique>` beside the output. Raises OSError.

    The owner is part of the name, so there is no moment at which a staging directory exists without its owner.
    """
    path = output.parent / f"{_prefix(output)}{_own_record()}-{uuid.uuid4().hex[:12]}"
    path.mkdir(mode=0o700)
    return path


def remove_abandoned(output: Path) -> None:
    """Remove the staging directories of the same output whose process on this machine is gone."""
    for path in _abandoned(output, "staging"):
        shutil.rmtree(path, ignore_errors=True)  # which leaves a link alone


def restore_replaced(output: Path) -> None:
    """Put back an output that a process had moved aside for its successor when it was killed. Raises OSError."""
    for path in _abandoned(output, "replaced"):
        if os.path.lexists(output):
            shutil.rmtree(path, ignore_errors=True)
        elif not path.is_symlink():
            os.rename(path, output)


def _abandoned(output: Path, kind: str) -> list[Path]:
    owner = r"([0-9a-f]{8})-([0-9a-f]{8})-([0-9]+)-([0-9]+)-[0-9a-f]{12}"
    pattern = re.compile(re.escape(f".{output.name}.{kind}-") + owner)
    matches = [(path, pattern.fullmatch(path.name)) for path in output.parent.iterdir()]
    return [path for path, match in matches if match and _is_abandoned(match)]


def _prefix(output: Path) -> str:
    return f".{output.name}.staging-"


def _own_record() -> str:
    return f"{_host()}-{_boot()}-{os.getpid()}-{_start_time(os.getpid())}"


def _is_abandoned(match: re.Match[str]) -> bool:
    host, boot, pid, start = match.groups()
    if host != _host():
        return False  # a shared file system: that process cannot be seen from here, so it may be alive
    return boot != _boot() or _start_time(int(pid)) != start


def _host() -> str:
    # Two containers on one machine share the kernel but not the process ids.
    try:
        namespace = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        namespace = 0
    return _short(f"{socket.gethostname()} {uuid.getnode()} {namespace}")


def _boot() -> str:
    try:
        return _short(Path("/proc/sys/kernel/random/boot_id").read_text())
    except OSError:
        return _short("")


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _start_time(pid: int) -> str:
    """Return a process's start time in the kernel's ticks; "0" where it is unknown, "" for no such process."""
    try:
        # The command name is in parentheses and may hold spaces, so count fields after the last one.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]  # a zombie does nothing more
    except (FileNotFoundError, ProcessLookupError):
        if sys.platform == "linux":
            return ""
    except OSError:
        return "0"
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except OSError:
        pass
    return "0"


def publish_new(staging: Path, output: Path) -> None:
    """Rename the staging directory to the output. Raises FileExistsError when something is there already."""
    if _renameat2(staging, output, _NOREPLACE):
        return
    if os.path.lexists(output):
        raise FileExistsError(errno.EEXIST, "exists", str(output))
    os.rename(staging, output)  # fails by itself on a file, and on a folder that is not empty


def publish_exchange(staging: Path, output: Path) -> None:
    """Swap the staging directory with the output, which then lies at the staging path. Raises OSError."""
    if _renameat2(staging, output, _EXCHANGE):
        return
    # Where the file system cannot swap, there is a moment without an output, and a way back if the second step fails; for
    # a process that is killed in it, `restore_replaced` goes that way.
    aside = staging.with_name(f".{output.name}.replaced-{staging.name.removeprefix(_prefix(output))}")
    os.rename(output, aside)
    try:
        os.rename(staging, output)
    except BaseException:
        os.rename(aside, output)
        raise
    os.rename(aside, staging)


def _renameat2(source: Path, target: Path, flags: int) -> bool:
    """Rename with flags; returns False where the system or the file system cannot. Raises OSError otherwise."""
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is None:
        return False
    if function(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), flags) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(target))
