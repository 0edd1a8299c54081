"""Resources of this process: CPU cores, memory, open files, standard streams."""

from __future__ import annotations

import errno
import io
import os
import resource
import sys
from contextlib import suppress
from pathlib import Path

from mlem_dist.errors import UsageError

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUP = Path("/proc/self/cgroup")

READER_GONE = (errno.EPIPE, errno.EIO)
"""Error numbers of a write to a pipe without a reader, and to a closed terminal."""


def available_cores() -> int:
    """Number of CPU cores that this process may use, by its affinity and its container's quota; at least 1."""
    return max(1, min(len(os.sched_getaffinity(0)), *map(int, _quotas())))


def memory_per_core() -> float:
    """Bytes of memory for each of `available_cores`, of the machine's memory or of its container's limit."""
    granted: list[float] = [float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))]
    files = [group / "memory.max" for group in _control_groups()]
    for file in (*files, CGROUPS / "memory" / "memory.limit_in_bytes"):
        # The word for no limit is no number.
        with suppress(OSError, ValueError):
            granted.append(float(int(file.read_text("utf-8"))))
    return min(granted) / available_cores()


def _control_groups() -> list[Path]:
    """The folders of the control group of this process and of those around it, in version 2 of control groups."""
    own = ""
    with suppress(OSError):
        # Control groups of version 2 have one line, 0::PATH; PATH starts at the root of the process's own namespace.
        own = next((line[3:] for line in OWN_CGROUP.read_text("utf-8").splitlines() if line.startswith("0::")), "")
    folder = CGROUPS / own.strip("/")
    return [group for group in (folder, *folder.parents) if group.is_relative_to(CGROUPS)]


def _quotas() -> list[float]:
    """CPU limits in cores: all cores of the machine, and the finite quota of each control group of this process."""
    granted: list[float] = [float(os.cpu_count() or 1)]
    for group in _control_groups():
        with suppress(OSError, ValueError):
            quota, period = (group / "cpu.max").read_text("utf-8").split()
            granted.append(float(quota) / float(period))
    with suppress(OSError, ValueError):
        quota, period = ((CGROUPS / "cpu" / f"cpu.cfs_{name}_us").read_text("utf-8") for name in ("quota", "period"))
        granted.append(float(quota) / float(period))
    return [quota for quota in granted if quota > 0]


def require_open_files(minimum: int, who: str) -> None:
    """Raise this process's soft limit of open files, which its children inherit, to at least `minimum`.

    Raises:
        UsageError: if the hard limit is less than the `minimum` that `who` needs.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    if hard != unlimited and hard < minimum:
        raise UsageError(
            f"this process may open {hard} files (ulimit -Hn), and {who} needs {minimum}; raise the hard limit"
        )
    if soft != unlimited and soft < minimum:
        resource.setrlimit(resource.RLIMIT_NOFILE, (minimum, hard))


def keep_streams() -> None:
    """Let the program outlive its standard streams.

    A stream that is closed from the start is replaced by the null device; otherwise the next opened file would take its
    descriptor. Text that nobody can read any more is dropped: on standard error after any error, on standard output if
    its reader is gone. Characters that the locale cannot encode are escaped.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    for name, harmless in (("stdout", READER_GONE), ("stderr", tuple(errno.errorcode))):
        stream = getattr(sys, name)
        # Code that has put another stream in place wants the output there.
        if stream is getattr(sys, f"__{name}__"):
            lasting = _LastingStream(stream, 1 if name == "stdout" else 2, harmless)
            setattr(sys, name, lasting)
            setattr(sys, f"__{name}__", lasting)


class _LastingStream(io.TextIOWrapper):
    """A standard stream that switches to the null device once a write fails with one of the `harmless` errors."""

    def __init__(self, stream: io.TextIOWrapper | None, descriptor: int, harmless: tuple[int, ...]) -> None:
        self._descriptor, self._harmless = descriptor, harmless
        if stream:
            encoding, line_buffering = stream.encoding, stream.line_buffering
            buffer = stream.detach()
        else:
            encoding, line_buffering = "utf-8", True
            buffer = open(descriptor, "wb", closefd=False)  # noqa: SIM115  # open for as long as the process
        super().__init__(buffer, encoding, "backslashreplace", line_buffering=line_buffering)

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError as error:
            self._drop(error)
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self._drop(error)

    def _drop(self, error: OSError) -> None:
        if error.errno not in self._harmless:
            raise error
        # Buffered text goes to the null device, too.
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._descriptor)
        os.close(null)
