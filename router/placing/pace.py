"""How fast tokens are wanted. Pure.

A worker's steps are as short as the strictest of those it serves needs them. Requests that want the
same pace therefore share workers: beside strict ones, loose ones would waste the time they grant.
"""

from __future__ import annotations

import math

#: That of requests without a target, and that of a microsecond.
SLOWEST, FASTEST = 14, -10


def pace_of(tpot_s: float | None) -> int:
    """Targets for later tokens that round to the same power of two of milliseconds are one pace."""
    if tpot_s is None or not tpot_s < 2**SLOWEST / 1e3:
        return SLOWEST
    return max(FASTEST, round(math.log2(max(tpot_s * 1e3, 2.0**FASTEST))))
