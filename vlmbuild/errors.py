"""The one exception tree: every message says what is wrong, where, and what to do about it.

`exit_code` is what the command line returns for the error (0 is success; 130 and 143 are interruptions).
"""

from __future__ import annotations


class VlmbuildError(Exception):
    """Base of every error that vlmbuild raises on purpose."""

    exit_code = 1


class UsageError(VlmbuildError, ValueError):
    """An option, a recipe or an argument is not valid."""

    exit_code = 2


class SourceError(VlmbuildError):
    """A checkpoint cannot be used: unknown architecture, missing, truncated or foreign files, wrong shapes."""


class CaptureError(VlmbuildError):
    """The model could not be traced into a graph that is dynamic in the promised dimensions."""


class PassError(VlmbuildError):
    """A graph pass broke its contract, or a required pass matched nothing."""


class ParityError(VlmbuildError):
    """An artifact that computes something else than its source."""


class BatchError(VlmbuildError, ValueError):
    """A batch contradicts itself, for example image tokens that differ from image features."""


class CompileError(VlmbuildError):
    """A region cannot be compiled to machine code."""


class GradientError(VlmbuildError):
    """A parameter that is to be trained gets no gradient, or a wrong one."""


class DeviceError(VlmbuildError):
    """A device that this machine does not have, or a kernel that it cannot run."""


class ArtifactError(VlmbuildError):
    """Something is wrong with an artifact on disk, or with the place it is written to."""


class OutputError(ArtifactError):
    """The output cannot be written: it exists, there is no space, the parent is missing."""


class IntegrityError(ArtifactError):
    """Files of an artifact that differ from its manifest: changed, missing, extra, swapped, or not plain files."""

    exit_code = 3


class TrustError(ArtifactError):
    """An artifact holds code, and the caller has not said that it is trusted."""

    exit_code = 4


class IncompatibleError(ArtifactError):
    """An artifact needs another version, operator or device than is here."""

    exit_code = 5


class ReportedError(VlmbuildError):
    """A failure that a command has printed as its result: with `--json`, no second document follows."""


class GraphDiffersError(ReportedError):
    """A compiled program that differs from its lock, or can no longer be made."""

    exit_code = 6


class EngineDiffersError(ReportedError):
    """An engine that computes something else than the artifact's program."""

    exit_code = 7


class UnreadableLockError(ReportedError, UsageError):
    """A file that should be a lock and cannot be read as one."""


def reason(error: Exception) -> str:
    """Return the text of an error; of an OSError without its number and path, which the message names already."""
    return getattr(error, "strerror", None) or str(error)
