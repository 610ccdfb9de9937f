"""The one exception a user is meant to read, and what is said of the machine's and native libraries' failures."""

from __future__ import annotations

import errno
import os
import re

#: What a command says that lacks the libraries of the extra: it is on no index yet.
INSTALL_COMPRESS = "pip install '.[compress]' in pocketfusion's clone"
INSTALL_ONNX = "pip install '.[onnx]' in pocketfusion's clone"
INSTALL_ONNX_EXPORT = "pip install '.[compress,onnx]' in pocketfusion's clone"
INSTALL_OPENVINO = "pip install '.[openvino]' in pocketfusion's clone"
INSTALL_COREML = "pip install '.[compress,coreml]' in pocketfusion's clone"
_CURES = {
    errno.ENOSPC: "free some space and run again",
    errno.EDQUOT: "free some space and run again",
    errno.EFBIG: "the file system or a limit (ulimit -f) allows no larger file, so choose another place",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOENT: "it is gone or was never there, so check the path",
    errno.EACCES: "check the permissions or choose another path",
    errno.EPERM: "check the permissions or choose another path",
    errno.EROFS: "choose another path",
    errno.ELOOP: "give the path of a file or folder itself, not of a link",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENOMEM: "free some memory or ask for less",
}
#: How Rust's libraries, and `shutil` of several files, tell of an OSError.
_NUMBER = re.compile(r"(?:\(os error |\[Errno )(\d+)")
_NO_MEMORY = re.compile(r"can't allocate memory|out of memory|bad_alloc", re.I)


class PocketfusionError(Exception):
    """Bad input or a failed stage, told in one sentence: what, where, what to do.

    The command line prints it without a traceback and exits with code 2.
    """


def told(error: BaseException) -> str | None:
    """One sentence for a failure of the machine, the terminal or a native library; None for a fault of our own."""
    kind = type(error).__name__
    if isinstance(error, PocketfusionError):
        return str(error)
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error))):
        return f"the memory is not enough{_reason(error)}: free some, or ask for less (a smaller batch, size or count)"
    if isinstance(error, RecursionError):
        return "the input is nested too deeply to be read: restore it from its source"
    if isinstance(error, EOFError):
        return f"a file ends too early{_reason(error)}: restore it from its source, or delete it if it is a cache"
    if isinstance(error, UnicodeError):
        return f"a text cannot be read or written as it is ({_line(error)}): save it as UTF-8"
    if kind == "PanicException":  # of Rust's libraries: a BaseException
        return f"a native library gave up on the input ({_line(error)}): restore it from its source"
    if getattr(error, "errno", None) is None and (number := number_of(error)):
        error = OSError(number, os.strerror(number))
    if isinstance(error, OSError):
        where = " and ".join(os.fsdecode(name) for name in (error.filename, error.filename2) if name)
        what = error.strerror or _line(error) or kind
        cure = _CURES.get(error.errno or 0, "check the path and the disk")
        return f"{where + ': ' if where else ''}{what[:1].lower() + what[1:]}: {cure}"
    return None


def number_of(error: BaseException) -> int | None:
    """The errno of an OSError, or of one that a library tells of in words; None for another failure."""
    number: int | None = getattr(error, "errno", None)
    if number is None and (found := _NUMBER.search(str(error))):
        return int(found[1])
    return number


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]


def _reason(error: BaseException) -> str:
    return f" ({line})" if (line := _line(error)) else ""
