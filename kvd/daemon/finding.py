"""Finding: what one examination of the machine has found, and how good that is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["ok", "warn", "bad"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing looked at: what it is, how good that is, and what it means or what to do."""

    name: str
    value: str
    verdict: Verdict
    advice: str
