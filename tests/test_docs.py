"""The worked examples of docs/formats are what the code does."""

from __future__ import annotations

import json
import re
from pathlib import Path

from kvd.keys import chained_key, pack_tokens
from kvd.layout import KVLayout
from kvd.proto import kvd_pb2 as pb
from kvd.proto import limits

DOCS = Path(__file__).parent.parent / "docs"


def hex_block(page: str) -> str:
    """The text of the page's worked example."""
    text = (DOCS / "formats" / page).read_text()
    return text.split("## Worked example", 1)[1].split("```")[1]


def hex_after(block: str, label: str) -> bytes:
    """The bytes on the lines that begin with `label` and on the unlabelled lines below it."""
    lines = block.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(label))
    found = [lines[start].removeprefix(label)]
    for line in lines[start + 1 :]:
        if not line.startswith(" "):
            break
        found.append(line)
    # Two blanks and a letter begin the remark.
    digits = [re.split(r"\s{2,}[^\s0-9a-f]|\s{2,}(?=[a-z]+ )", line.strip())[0] for line in found]
    return bytes.fromhex("".join(digits))


def test_the_keys_example_is_right() -> None:
    block = hex_block("keys.md")
    layout = KVLayout(
        model="m",
        revision="r",
        dtype="bfloat16",
        num_layers=2,
        num_planes=1,
        num_kv_heads=1,
        head_dim=576,
        chunk_tokens=4,
        rank=1,
        world_size=2,
        group="full",
        salt="tenant-ü",
    )
    assert hex_after(block, "fingerprint") == layout.fingerprint
    assert hex_after(block, "domain") == b"kvd.layout.1"
    assert hex_after(block, "dtype")[4:9] == b"dtype"
    tokens = [13, 7932, 15851, 23770]
    assert hex_after(block, "key") == chained_key(layout.fingerprint, tokens)
    parts = next(line for line in block.splitlines() if line.startswith("chained")).split("|")
    assert bytes.fromhex(parts[0].removeprefix("chained")) == b"kvd.chain.1"
    assert bytes.fromhex(parts[2]) == pack_tokens(tokens)


def test_the_protocol_example_is_right() -> None:
    block = hex_block("protocol.md")
    request = pb.Request.FromString(hex_after(block, "request"))
    assert request == pb.Request(id=5, lookup=pb.LookupRequest(keys=b"\x11" * 32))
    response = pb.Response.FromString(hex_after(block, "response"))
    assert response == pb.Response(id=5, lookup=pb.LookupReply(count=1))
    key = b"\x11" * 32
    pin = pb.PinRequest(keys=key, layout=key, is_exact=True, codecs=["kvq/1"])
    assert pb.Request.FromString(hex_after(block, "pin")) == pb.Request(id=6, pin=pin)
    reply = pb.PinReply(
        lease=1,
        deadline_ns=1000,
        offsets=[4096],
        sizes=[300],
        num_tokens=[256],
        ready=[300],
        codecs=["kvq/1"],
        starts=[512],
    )
    assert pb.Response.FromString(hex_after(block, "lease")) == pb.Response(id=6, pin=reply)


def test_the_protocol_page_names_the_real_limits() -> None:
    text = (DOCS / "formats" / "protocol.md").read_text()
    for number in (limits.MESSAGE_SIZE_MAX, limits.KEYS_MAX, limits.CLEAR_LIMIT_MAX):
        assert f"{number:,}" in text
    assert f"names | {limits.CODECS_MAX} |" in text
    assert f"1 to {limits.CODEC_SIZE_MAX} letters" in text
    assert f"version {limits.PROTOCOL_VERSION}" in text
    verbs = [field.name for field in pb.Request.DESCRIPTOR.oneofs_by_name["verb"].fields]
    table = text.split("## Verbs", 1)[1].split("##")[0]
    assert all(re.search(rf"\b{verb}\b", table) for verb in verbs)


def test_golden_keys_are_those_of_the_page() -> None:
    golden = json.loads((DOCS.parent / "tests/fixtures/keys/golden.json").read_text())
    assert hex_after(hex_block("keys.md"), "key").hex() == golden[1]["chain"][0]
