"""The machine: device, precision, threads, memory. Nothing here changes a result's meaning."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import resource
import sys
from pathlib import Path
from typing import Literal

import torch

from cheaplunch import processes
from cheaplunch.errors import UserError

Precision = Literal["fp32", "bf16", "fp16"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


def pick_device(wanted: Literal["auto", "cpu", "cuda"]) -> torch.device:
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device here; use --device cpu or auto")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def pick_precision(wanted: Literal["auto", "fp32", "bf16", "fp16"], device: torch.device) -> Precision:
    """bf16 where the hardware multiplies it and gets it right; software bf16 is slower than fp32."""
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        has_it = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has_it = torch.cpu._is_avx512_bf16_supported()
    return "bf16" if has_it and bf16_is_right(device) else "fp32"


def bf16_is_right(device: torch.device) -> bool:
    """A product of two random matrices in bf16 agrees with float64 as 8 bits of mantissa allow.

    Some processors and library builds announce the instructions and compute something else.
    """
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(64, 64, generator=generator) for _ in range(2))
    product = (a.to(device, torch.bfloat16) @ b.to(device, torch.bfloat16)).cpu().double()
    exact = a.bfloat16().double() @ b.bfloat16().double()
    # One rounding of the sum at 2^-9 relative; the sums have a standard deviation of 8.
    return bool((product - exact).abs().max() < 8 * exact.std() * 2**-9)


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    return torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32")


def use_cores() -> int:
    """Sets torch's threads to this process's share of the cores that are ours; returns how many.

    torch counts the machine's cores; a container or a batch system may have given us two of sixty-four, and
    threads that wait for a core that is not theirs make a step many times slower. OMP_NUM_THREADS has the last word.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, cores() // processes.on_this_machine()))
    return torch.get_num_threads()


def cores() -> int:
    """Physical cores this process may use: by its affinity, and by its control group's share of time."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    count = min(len(allowed), len(_physical(allowed)) or len(allowed))
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            count = min(count, math.ceil(int(quota) / int(period)))
    return max(1, count)


def _physical(logical: set[int]) -> set[str]:
    """One name for each physical core among logical ones: threads of one core compete for its multipliers."""
    found = set()
    for number in logical:
        with contextlib.suppress(OSError):
            found.add(Path(f"/sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list").read_text().strip())
    return found


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory used so far: of the process, or on a GPU of torch's there."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def keep_freed_memory() -> None:
    """Tells glibc to reuse large blocks instead of returning them to the system after each use.

    A decoder step allocates and frees hundreds of blocks of some MB; without this, more time goes into
    fetching zeroed pages than into arithmetic.
    """
    if sys.platform != "linux":
        return
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:  # another C library; nothing to tune
        return
    libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30)
    libc.mallopt(_M_TRIM_THRESHOLD, -1)
