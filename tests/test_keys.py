"""Keys are the same on every machine and in every version, and differ wherever KV differs."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvd.errors import InvalidRequest
from kvd.keys import (
    block_keys,
    chain_keys,
    chained_key,
    join_keys,
    pack_tokens,
    parse_key,
    split_keys,
    standalone_key,
)
from kvd.layout import KVLayout

GOLDEN = json.loads((Path(__file__).parent / "fixtures/keys/golden.json").read_text())

ROOT = bytes(range(32))

token_rows = st.lists(st.integers(0, 2**32 - 1), max_size=40)


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["layout"]["model"])
def test_keys_of_earlier_versions_are_still_the_keys(case: dict) -> None:
    layout = KVLayout(**case["layout"])
    tokens = [(i * 7919 + 13) % 49152 for i in range(3 * layout.chunk_tokens + 1)]
    root = layout.fingerprint
    assert root.hex() == case["fingerprint"]
    chain = chain_keys(root, tokens, chunk_tokens=layout.chunk_tokens)
    assert [key.hex() for key in chain] == case["chain"]
    assert chained_key(root, tokens[:3]).hex() == case["partial"]
    assert standalone_key(root, tokens[: layout.chunk_tokens]).hex() == case["standalone"]
    hashes = [bytes([i]) * 32 for i in range(8)]
    assert [k.hex() for k in block_keys(root, hashes, blocks_per_chunk=4)] == case["blocks"]


def test_another_process_makes_the_same_keys() -> None:
    code = (
        "from kvd.keys import chain_keys as c; print(c(bytes(range(32)), range(9), chunk_tokens=4))"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert output.stdout.strip() == str(chain_keys(ROOT, range(9), chunk_tokens=4))


@given(token_rows, st.integers(1, 9))
def test_a_chain_is_its_chunks_one_by_one(tokens: list[int], chunk_tokens: int) -> None:
    chain = chain_keys(ROOT, np.array(tokens, dtype=np.int64), chunk_tokens=chunk_tokens)
    assert len(chain) == len(tokens) // chunk_tokens
    parent = ROOT
    for index, key in enumerate(chain):
        parent = chained_key(parent, tokens[index * chunk_tokens : (index + 1) * chunk_tokens])
        assert key == parent


@given(token_rows.filter(bool), st.data())
def test_a_changed_token_changes_its_key_and_all_behind_it(
    tokens: list[int], data: st.DataObject
) -> None:
    at = data.draw(st.integers(0, len(tokens) - 1))
    other = [*tokens]
    other[at] ^= 1
    before = chain_keys(ROOT, tokens, chunk_tokens=1)
    after = chain_keys(ROOT, other, chunk_tokens=1)
    assert before[:at] == after[:at]
    assert all(a != b for a, b in zip(before[at:], after[at:], strict=True))


def test_the_same_tokens_have_three_different_keys_by_use() -> None:
    packed = pack_tokens([1, 2, 3, 4])
    keys = {
        chained_key(ROOT, [1, 2, 3, 4]),
        standalone_key(ROOT, [1, 2, 3, 4]),
        *block_keys(ROOT, [packed], blocks_per_chunk=1),
    }
    assert len(keys) == 3


def test_integer_types_do_not_matter() -> None:
    rows = [
        [5, 6],
        (5, 6),
        np.array([5, 6], np.int32),
        np.array([5, 6], ">u8"),
        np.array([5, 6], "u2"),
    ]
    assert len({chained_key(ROOT, row) for row in rows}) == 1


@pytest.mark.parametrize("bad", [[-1], [1 << 32], [[1, 2]], [1.5], ["a"], np.array(3)])
def test_tokens_that_are_none_are_refused(bad: object) -> None:
    with pytest.raises(InvalidRequest):
        pack_tokens(bad)  # type: ignore[arg-type]


@given(st.lists(st.binary(min_size=32, max_size=32), max_size=5))
def test_joined_keys_split_again(keys: list[bytes]) -> None:
    assert split_keys(join_keys(keys)) == keys


@pytest.mark.parametrize("size", [1, 31, 33, 95])
def test_packed_keys_of_a_broken_length_are_refused(size: int) -> None:
    with pytest.raises(InvalidRequest, match=str(size)):
        split_keys(bytes(size))


@pytest.mark.parametrize("text", ["", "zz" * 32, "00" * 31, "00" * 33, "0x" + "00" * 31])
def test_a_typed_key_is_64_hex_digits(text: str) -> None:
    with pytest.raises(InvalidRequest, match="64 hexadecimal"):
        parse_key(text)


BASE = KVLayout(model="m", revision="r", dtype="float16", num_layers=2, num_kv_heads=2, head_dim=8)
CHANGES = {
    "model": "n",
    "revision": "s",
    "dtype": "bfloat16",
    "num_layers": 3,
    "num_planes": 1,
    "num_kv_heads": 4,
    "head_dim": 16,
    "chunk_tokens": 128,
    "axes": "plane,layer,token,head,dim",
    "rope": "linear 2",
    "rank": 1,
    "world_size": 3,
    "group": "sliding",
    "salt": "tenant",
}


@pytest.mark.parametrize("field", [field.name for field in fields(KVLayout)])
def test_every_field_of_a_layout_changes_its_fingerprint(field: str) -> None:
    base = replace(BASE, world_size=2)
    assert replace(base, **{field: CHANGES[field]}).fingerprint != base.fingerprint


def test_texts_do_not_run_into_each_other() -> None:
    one = replace(BASE, group="ab", salt="c")
    other = replace(BASE, group="a", salt="bc")
    assert one.fingerprint != other.fingerprint


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "int4"},
        {"num_layers": 0},
        {"head_dim": 1 << 21},
        {"rank": 1},
        {"rank": -1},
        {"salt": "x" * 5000},
    ],
)
def test_an_impossible_layout_cannot_be_made(change: dict) -> None:
    with pytest.raises(InvalidRequest):
        replace(BASE, **change)


def test_sizes_follow_from_the_axes() -> None:
    assert BASE.token_size == 2 * 2 * 2 * 8 * 2
    assert BASE.size(256) == 256 * BASE.token_size == np.prod(BASE.shape(256)) * 2
