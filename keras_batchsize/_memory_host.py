"""What the operating system says about memory, in bytes, and about its CPU.

Linux tells through /proc and the control group, other systems little. What
cannot be told is None.
"""

import ctypes
import gc
import os
import pathlib
import platform
import re

_STATUS = pathlib.Path("/proc/self/status")
_CLEAR = pathlib.Path("/proc/self/clear_refs")
_MEMINFO = pathlib.Path("/proc/meminfo")
_CPUINFO = pathlib.Path("/proc/cpuinfo")
_OWN_GROUPS = pathlib.Path("/proc/self/cgroup")
# Control groups, version 2 and 1: folder, limit, usage, and what of the usage
# the system gives back first.
_GROUPS = (
    ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    (
        "/sys/fs/cgroup/memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
    ),
)


def _read(path):
    try:
        return pathlib.Path(path).read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""


def _kilobytes(name, text):
    found = re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)
    return int(found.group(1)) * 1024 if found else None


def processor():
    """Returns the name of the CPU, and how many of its cores may be used."""
    found = re.search(r"^model name\s*:(.*)$", _read(_CPUINFO), re.MULTILINE)
    name = found.group(1) if found else platform.processor()
    usable = getattr(os, "sched_getaffinity", None)
    return name.strip(), os.cpu_count() if usable is None else len(usable(0))


def resident_bytes():
    """Returns the memory of the process, or None."""
    return _kilobytes("VmRSS", _read(_STATUS))


def peak_bytes():
    """Returns the largest memory of the process since `reset_peak`, or None."""
    return _kilobytes("VmHWM", _read(_STATUS))


def reset_peak():
    """Lets `peak_bytes` count from now.

    Returns:
        Whether the system lets it. Other systems than Linux, and some
        containers, only tell the peak since the process began, which says
        nothing of a step.
    """
    gc.collect()
    try:
        # Gives freed memory back, or the next peak would hide in it.
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        pass  # Another C library.
    try:
        _CLEAR.write_text("5", encoding="ascii")
    except OSError:
        return False
    return peak_bytes() is not None


def available_bytes():
    """Returns the memory that the process may still take, or None."""
    found = [_kilobytes("MemAvailable", _read(_MEMINFO))]
    for top, *names in _GROUPS:
        for folder in _folders_below(pathlib.Path(top)):
            found.append(_left_in_group(folder, *names))
    found.append(_address_space())
    known = [max(one, 0) for one in found if one is not None]
    return min(known, default=None)


def most_bytes():
    """Returns the memory that the process may still take, or None.

    Where only that is told (macOS), all that the machine has.
    """
    free = available_bytes()
    if free is not None:
        return free
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None  # Windows has no `sysconf`.


def _left_in_group(folder, limit, usage, cached):
    """Returns the memory that a control group may still take, or None.

    Pages of files that were read long ago count as its usage, though they are
    given back when memory is needed; a group that has read large files would
    seem to be full.
    """
    most, used = _read(folder / limit).strip(), _read(folder / usage).strip()
    if not (most.isdigit() and used.isdigit()):
        return None
    stated = rf"^{cached} (\d+)$"
    found = re.search(stated, _read(folder / "memory.stat"), re.MULTILINE)
    kept = int(used) - (int(found.group(1)) if found else 0)
    return int(most) - max(kept, 0)


def _folders_below(top):
    """Returns the folders of the process's control group and those above.

    In a container the own group is shown as the top; outside (SLURM, systemd)
    it lies below, and the limit of each above holds as well.

    Args:
        top: Where the groups of memory are.
    """
    folders = {top}
    for line in _read(_OWN_GROUPS).splitlines():
        _, controllers, path = line.split(":", 2)
        is_memory = not controllers or "memory" in controllers.split(",")
        # A path with dots leads out of what the process may see.
        if is_memory and ".." not in path:
            own = top / path.strip("/")
            folders |= {own, *own.parents[: len(own.parts) - len(top.parts)]}
    return sorted(folders)


def _address_space():
    try:
        import resource
    except ImportError:
        return None
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    used = _kilobytes("VmSize", _read(_STATUS))
    if soft == resource.RLIM_INFINITY or used is None:
        return None
    return soft - used
