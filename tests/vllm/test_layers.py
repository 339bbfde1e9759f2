"""Loads within a step: an engine with nothing else to do computes a layer when it is there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from kvd.keys import ChunkKey
from tests.vllm.counts import Since, num_pieces
from tests.vllm.daemon import Daemon
from tests.vllm.harness import Engine, Request, prompt
from tests.vllm.reference import Reference

pytestmark = pytest.mark.vllm(since="0.30", why="no step could be taken back")

LENGTH = 600
# A step, of those that an engine takes which computes 16 tokens in each.
ABORT_AT = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """An engine that computes a few tokens in each step, and whose daemon has accidents."""

    daemon: Daemon
    engine: Engine

    def store(self, tokens: list[int]) -> None:
        """The daemon has these, and the engine has nothing itself."""
        self.daemon.clear()
        self.engine.forget()
        self.engine.generate({"prompt": tokens, "new_tokens": 1})
        self.daemon.until_stored(num_pieces(len(tokens)))
        self.engine.forget()

    def damage(self) -> None:
        """What is loaded is wrong, and found to be when it has been computed on."""
        keys = [ChunkKey(chunk.key) for chunk in self.daemon.chunks()]
        self.daemon.overwrite(keys, lambda chunk: chunk.neg_())


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("layers")
    few = {
        # Of a step no request has more than half: others go on before the first has all its KV.
        "max_num_batched_tokens": 32,
        "long_prefill_token_threshold": 16,
        "max_num_seqs": 16,
    }
    with Daemon(folder) as daemon:
        transfer = daemon.transfer(verify=True)
        with Engine(folder, "qwen3", **few, **transfer) as engine:
            yield Site(daemon=daemon, engine=engine)


def request_of(seed: int, more: int, **rest: object) -> Request:
    """One that begins as all of this seed do."""
    return {"prompt": prompt(seed, LENGTH) + prompt(more, 30), "new_tokens": 16, **rest}


@pytest.mark.parametrize("is_wanted", [True, False])
def test_a_layer_is_loaded_while_the_one_before_is_computed(
    node: Daemon, reference: Reference, tmp_path: Path, is_wanted: bool
) -> None:
    request = {"prompt": prompt(700, LENGTH), "new_tokens": 16}
    transfer = node.transfer(salt="layers", layer_by_layer=is_wanted)
    with Engine(tmp_path, "qwen3", name="first", **transfer) as first:
        # Both runs have the same name space: the second has nothing to store.
        first.generate(request)
        node.until_idle()
    with Engine(tmp_path, "qwen3", name="second", **transfer) as second:
        since = Since(second)
        (answer,) = second.generate(request)
        found = since()
    reference.check(request, answer)
    assert (found["hits"], found["hits_in_step"]) == (1, is_wanted)
    assert answer.cached_tokens == found["hit_tokens"] == 576


def test_ranks_load_within_the_step(node: Daemon, reference: Reference, tmp_path: Path) -> None:
    request = {"prompt": prompt(701, LENGTH), "new_tokens": 16}
    transfer = node.transfer(salt="ranks, layers")
    with Engine(tmp_path, "qwen3", tensor_parallel_size=2, **transfer) as engine:
        node.new_keys(lambda: engine.generate(request), 2 * num_pieces(LENGTH))
        engine.forget()
        since = Since(engine)
        (answer,) = engine.generate(request)
        assert since()["hits_in_step"] == 1
    reference.check(request, answer)


def test_requests_that_share_blocks_whose_load_fails(site: Site, reference: Reference) -> None:
    site.store(prompt(710, LENGTH))
    site.damage()
    requests = [request_of(710, more) for more in (711, 712, 713)]
    since = Since(site.engine)
    for request, answer in zip(requests, site.engine.generate(*requests), strict=True):
        reference.check(request, answer)
    found = since()
    assert found["hits_in_step"] == 1
    # One that came too late for this step loads by itself.
    assert found["miss_lost"] >= 1


def test_nobody_finds_what_was_computed_on_a_load_that_failed(
    site: Site, reference: Reference
) -> None:
    site.store(prompt(720, LENGTH))
    site.damage()
    # By then its load has failed, and it has not yet computed all of it anew.
    (aborted,) = site.engine.generate(request_of(720, 721, abort_at=ABORT_AT))
    assert (aborted.finish, aborted.tokens) == ("abort", [])
    site.daemon.clear()
    for more in (721, 722):
        request = request_of(720, more)
        reference.check(request, *site.engine.generate(request))


def test_a_step_whose_load_fails_stores_nothing(site: Site, reference: Reference) -> None:
    site.store(prompt(730, LENGTH))
    site.damage()
    request = {"prompt": prompt(730, LENGTH) + prompt(731, 60), "new_tokens": 1}
    reference.check(request, *site.engine.generate(request))
    site.engine.settle()
    # Whatever is there by now, the damaged chunk aside, is right.
    for _ in range(2):
        site.engine.forget()
        longer = request | {"prompt": request["prompt"] + prompt(732, 200), "new_tokens": 16}
        reference.check(longer, *site.engine.generate(longer))
        site.daemon.until_idle()
