"""The rate of the host's time-stamp counter.

Under TCG a guest's counter is the host's. On a busy host, a guest sometimes fails to calibrate it
against an emulated timer, and then waits forever. A guest that is told the rate does not calibrate.
"""

import ctypes
import mmap
import time

# rdtsc; shl rdx, 32; or rax, rdx; ret
_CODE = bytes((0x0F, 0x31, 0x48, 0xC1, 0xE2, 0x20, 0x48, 0x09, 0xD0, 0xC3))
_SPAN_S = 0.25
_TRIES = 200


def measure_khz() -> int:
    """Return the counter's rate in kHz, measured over a quarter of a second.

    Each end is the tightest of many pairs of readings, so that being preempted between the two does
    not count. The result is accurate to a few parts in a million.
    """
    with mmap.mmap(
        -1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
    ) as page:
        page.write(_CODE)
        start = ctypes.c_char.from_buffer(page)
        try:
            read = ctypes.CFUNCTYPE(ctypes.c_uint64)(ctypes.addressof(start))
            ticks_then, ns_then = _tightest_pair(read)
            time.sleep(_SPAN_S)
            ticks_now, ns_now = _tightest_pair(read)
        finally:
            del start
    return round((ticks_now - ticks_then) * 1_000_000 / (ns_now - ns_then))


def _tightest_pair(read: "ctypes._CFunctionType") -> tuple[int, int]:
    best = (1 << 62, 0, 0)
    for _ in range(_TRIES):
        before = time.monotonic_ns()
        ticks = int(read())
        after = time.monotonic_ns()
        best = min(best, (after - before, ticks, (before + after) // 2))
    return best[1], best[2]
