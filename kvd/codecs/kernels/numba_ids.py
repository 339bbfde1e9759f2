"""ids.py, compiled."""

from __future__ import annotations

from numba import njit

from kvd.codecs.kernels import ids

num_bits = njit(nogil=True, cache=True)(ids.num_bits)
write = njit(nogil=True, cache=True)(ids.write)
read = njit(nogil=True, cache=True)(ids.read)
