"""The machine: which device, which precision, how memory is kept. Nothing here changes a result's meaning."""

from __future__ import annotations

import ctypes
import sys
from typing import Literal

import torch

from cheaplunch.errors import UserError

Precision = Literal["fp32", "bf16"]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


def pick_device(wanted: Literal["auto", "cpu", "cuda"]) -> torch.device:
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device here; use --device cpu or auto")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def pick_precision(wanted: Literal["auto", "fp32", "bf16"], device: torch.device) -> Precision:
    """bf16 where the hardware multiplies it; software bf16 is slower than fp32."""
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() else "fp32"


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
