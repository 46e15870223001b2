"""The archive of a package with machine code, checked before torch unpacks it: torch writes members wherever they say."""

from __future__ import annotations

import io
import struct
import zipfile

from vlmbuild.artifact.paths import check_path
from vlmbuild.errors import IncompatibleError, IntegrityError

_LOCAL = struct.Struct("<4s5H3I2H")
"""Header of a member before its data."""
_DESCRIPTORS = (0, 12, 16, 20, 24)
"""Sizes of the record that may follow a member's data."""


def check_package(package: bytes, where: str) -> None:
    """Raise IncompatibleError for an archive that torch's own writer would not have made.

    Members are stored as they are, under one folder, each name once, one after the other from the first byte to the
    directory at the end: nothing can be written elsewhere, grow, or be read in two ways.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(package)) as archive:
            members = sorted(archive.infolist(), key=lambda member: member.header_offset)
            _check_names(members)
            end = 0
            for member in members:
                if member.header_offset - end not in _DESCRIPTORS[: None if end else 1]:
                    raise ValueError(f"there are bytes before {member.filename!r} that belong to no member")
                end = _end_of_member(package, member)
            if archive.start_dir - end not in _DESCRIPTORS:
                raise ValueError("there are bytes after its last member that belong to none")
    except (zipfile.BadZipFile, ValueError, struct.error, NotImplementedError, IntegrityError) as error:
        raise IncompatibleError(f"{where} is not a package of torch: {error}. Build the artifact again.") from error


def _check_names(members: list[zipfile.ZipInfo]) -> None:
    names = [check_path(member.orig_filename) for member in members]
    if len({name.casefold() for name in names}) != len(names):
        raise ValueError("two members have one name")
    if len({name.partition("/")[0] for name in names}) != 1 or not all("/" in name for name in names):
        raise ValueError("its members are not in one folder")


def _end_of_member(package: bytes, member: zipfile.ZipInfo) -> int:
    """Return where a member's data ends; what stands before the data must say the same as the directory does."""
    if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 0x1 or member.compress_size != member.file_size:
        raise ValueError(f"{member.filename!r} is compressed or encrypted")
    signature, _, _, method, *_, name_length, extra_length = _LOCAL.unpack_from(package, member.header_offset)
    start = member.header_offset + _LOCAL.size
    if signature != b"PK\3\4" or method != zipfile.ZIP_STORED:
        raise ValueError(f"{member.filename!r} has no header of a stored member")
    if package[start : start + name_length] != member.orig_filename.encode():
        raise ValueError(f"{member.filename!r} has another name before its data")
    end: int = start + name_length + extra_length + member.file_size
    return end
