"""Which codec keeps a chunk in which tier, as an operator says it.

nvme=kvq:2               all chunks on disk
nvme/system=bf16         those of category `system`, whatever the rule for all says
nvme=kvq:2,cpu=bf16      several rules; a tier without one keeps chunks raw
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

RAW = "raw"

# Tiers that can keep bitstreams.
TIERS = ("cpu", "nvme")

RULES_MAX = 256

_SPEC = re.compile(r"[a-z0-9_-]+(:[A-Za-z0-9_.-]+)?", re.ASCII)


@dataclass(frozen=True, slots=True)
class CodecRules:
    """Specs of codecs by (tier, category); the category "" is for all others."""

    specs: Mapping[tuple[str, str], str] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> CodecRules:
        """The rules in a text like `nvme=kvq:2,nvme/system=bf16`; none in an empty one. Raises
        `ValueError`.
        """
        # Numpy comes with it, and `kvd --help` reads this module.
        from kvd.chunk import CATEGORY_SIZE_MAX

        specs: dict[tuple[str, str], str] = {}
        parts = [part.strip() for part in text.split(",")] if text.strip() else []
        if len(parts) > RULES_MAX:
            raise ValueError(f"at most {RULES_MAX} rules wanted, found {len(parts)}")
        for part in parts:
            place, equals, spec = part.partition("=")
            tier, slash, category = place.partition("/")
            if not equals or not _SPEC.fullmatch(spec) or bool(slash) != bool(category):
                raise ValueError(
                    "rules like nvme=kvq:2 or nvme/category=bf16, with commas between them, "
                    f"wanted, found {part!r}"
                )
            if tier not in TIERS:
                raise ValueError(f"tier {' or '.join(TIERS)} wanted in {part!r}, found {tier!r}")
            if len(category.encode()) > CATEGORY_SIZE_MAX:
                raise ValueError(f"a category of at most {CATEGORY_SIZE_MAX} bytes wanted")
            if (tier, category) in specs:
                raise ValueError(f"one rule for {place} wanted, found two")
            specs[tier, category] = spec
        return cls(specs)

    def of(self, tier: str, category: str) -> str:
        """The spec of the codec that keeps chunks of a category in a tier."""
        found = self.specs.get((tier, category)) if category else None
        return found or self.specs.get((tier, ""), RAW)

    def specs_of(self, tier: str) -> set[str]:
        """All that a tier may have to encode with, `raw` left out."""
        return {spec for (name, _), spec in self.specs.items() if name == tier} - {RAW}


def read_codec_rules(value: object) -> str:
    """A reader for the rules, as a text."""
    if not isinstance(value, str) or not value.isprintable():
        raise ValueError(f"printable text wanted, found {value!r}")
    CodecRules.parse(value)
    return value
