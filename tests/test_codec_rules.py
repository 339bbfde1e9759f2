"""Rules that say which codec keeps a chunk where."""

from __future__ import annotations

import pytest

from kvd.daemon.codec_rules import CodecRules, read_codec_rules


def test_a_tier_without_a_rule_keeps_chunks_raw() -> None:
    rules = CodecRules.parse("nvme=kvq:2")
    assert rules.of("nvme", "") == "kvq:2"
    assert rules.of("nvme", "chat") == "kvq:2"
    assert rules.of("cpu", "chat") == "raw"
    assert CodecRules.parse("").of("nvme", "chat") == "raw"


def test_a_category_has_its_own_codec() -> None:
    rules = CodecRules.parse("nvme=kvq:2-head, nvme/system=bf16,cpu/rag=kvq:3,nvme/x=raw")
    assert rules.of("nvme", "system") == "bf16"
    assert rules.of("nvme", "x") == "raw"
    assert rules.of("nvme", "other") == "kvq:2-head"
    assert rules.of("cpu", "rag") == "kvq:3"
    assert rules.of("cpu", "") == "raw"
    assert rules.specs_of("nvme") == {"kvq:2-head", "bf16"}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("nvme", "rules like"),
        ("nvme=", "rules like"),
        ("=bf16", "tier cpu or nvme"),
        ("nvme/=bf16", "rules like"),
        ("nvme=bf16,", "rules like"),
        ("gpu=bf16", "tier cpu or nvme"),
        ("nvme=bf16,nvme=raw", "found two"),
        ("nvme=a b", "rules like"),
        (f"nvme/{'x' * 65}=bf16", "at most 64"),
        (",".join(f"nvme/{i}=bf16" for i in range(257)), "at most 256"),
    ],
)
def test_what_is_no_rule_is_refused(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        CodecRules.parse(text)


def test_a_reader_takes_text_only() -> None:
    assert read_codec_rules("cpu=bf16") == "cpu=bf16"
    with pytest.raises(ValueError, match="printable"):
        read_codec_rules(3)
