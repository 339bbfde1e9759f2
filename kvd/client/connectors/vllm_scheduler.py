"""The scheduler's side of the connector: which prompts are in kvd, and what the workers move.

    a prompt comes ─► matched: found so far? ─► allocated: its blocks ─► plan: load, then compute
    a step is planned ─► plan: chunks that will be complete when it ends are saved

Nothing here waits for the daemon longer than `INLINE_S`, and nothing is kept for it: blocks are
freed as the engine likes, and a worker that is still reading from some that are about to be written
hears of it first.

A load may be part of the step that computes on it, where that makes nobody else wait. What such a
step computes is saved by a later one, and if the load fails, taken back.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from kvd.client.connectors.vllm_events import EventBook, Stored
from kvd.client.connectors.vllm_finder import INLINE_S, Finder, Found, Question, Tails
from kvd.client.connectors.vllm_identity import Engine, Group, adapter_of
from kvd.client.connectors.vllm_names import Approximate, Names
from kvd.client.connectors.vllm_options import Options, RequestOptions, request_options
from kvd.client.connectors.vllm_plan import Load, Piece, Plan, Save
from kvd.client.connectors.vllm_stats import Tally
from kvd.errors import Unsupported
from kvd.proto.limits import KEYS_MAX

log = logging.getLogger("kvd.vllm")

# Bytes that a rank loads within a step, at most: who comes meanwhile waits for them.
STEP_SIZE_MAX = 256 << 20

# So many loads within steps that fail one after the other are the last: an engine that does not
# stop at its layers would compute every such prompt twice.
STEP_FAILURES_MAX = 3

Blocks = tuple[list[int], ...]


@dataclass(slots=True, kw_only=True)
class _Tracked:
    """A request that the engine has. `request` is vLLM's own, whose hashes grow with it."""

    request: Any
    options: RequestOptions
    blocks: Blocks
    adapter: bytes
    names: list[bytes] = field(default_factory=list)
    question: Question | None = None
    found: Found | None = None
    # Where the engine's own hit ends, as it stood when the answer was given.
    local_tokens: int = 0
    # Whether the answer was that the load is part of the step.
    is_in_step: bool = False
    # Up to here pieces were given to be saved.
    saved_tokens: int = 0
    has_saved_tail: bool = False
    is_missed: bool = False
    has_failed: bool = False
    is_exact: bool = True


class _AtRisk(NamedTuple):
    """What a step that loads computes of a request: tokens `start` to `end`, in its blocks."""

    tracked: _Tracked
    blocks: Sequence[int]
    start: int
    end: int


class SchedulerSide:
    """Plans for `engine`, with what `finder` finds."""

    def __init__(
        self,
        engine: Engine,
        finder: Finder,
        options: Options,
        tally: Tally,
        *,
        events: EventBook | None = None,
    ) -> None:
        self._engine = engine
        self._events = events
        self._finder = finder
        self._options = options
        self._tally = tally
        self._requests: dict[str, _Tracked] = {}
        self._loads: list[Load] = []
        # Pins of loads under way, and the blocks that they fill.
        self._pinned: dict[str, tuple[Found, set[int]]] = {}
        self._approximate = Approximate(engine)
        self._names = Names(engine)
        # Takes blocks out of the engine's prefix cache; None where loads may not be in a step.
        self._evict: Callable[[set[int]], None] | None = None
        # Requests that have blocks, and those of a step that loads.
        self._admitted: set[str] = set()
        self._at_risk: list[_AtRisk] = []
        self._num_failed_in_step = 0

    def allow_in_step(self, evict: Callable[[set[int]], None]) -> None:
        """Loads may be part of a step, if one that has failed can be taken back: bad blocks can be
        told, and the next step is planned when it has ended. `evict` takes blocks out of the
        engine's prefix cache.
        """
        can_be_taken_back = not (self._engine.fails_as_a_whole or self._engine.plans_ahead)
        if self._options.layer_by_layer and can_be_taken_back:
            self._evict = evict

    def is_in_step(self, request: Any) -> bool:
        """Whether what `matched` found is loaded while the request is computed."""
        return self._track(request).is_in_step

    def matched(self, request: Any, num_computed: int) -> int | None:
        """How many tokens beyond `num_computed` can be loaded; None while that is not known."""
        tracked = self._track(request)
        if not (self._options.loads and tracked.options.load):
            self._miss(tracked, "not_wanted")
            return 0
        if tracked.has_failed:
            # vLLM asks again after a load that failed: once is enough.
            return 0
        found = self._found(tracked)
        if found is None:
            return None
        tracked.found, tracked.local_tokens = found, num_computed
        tracked.is_in_step = self._goes_in_step(tracked, found, num_computed)
        num_new = found.num_tokens - num_computed
        if num_new >= max(self._options.min_hit_tokens, 1):
            return num_new
        reason = found.reason
        if found.num_tokens:
            reason = "local" if num_new <= 0 else "short"
        self._finder.let_go(found)
        tracked.found = Found(reason=reason)
        self._miss(tracked, reason, found.detail)
        return 0

    def allocated(self, request: Any, blocks: Blocks, num_external: int) -> None:
        """The request has these blocks; `num_external` tokens of what was found are wanted."""
        tracked = self._track(request)
        self._admitted.add(request.request_id)
        found, tracked.found = tracked.found or Found(), None
        if not num_external:
            self._finder.let_go(found)
            return
        # From here on the engine waits until a worker has said that the load has ended.
        end = tracked.local_tokens + num_external
        load = self._load(tracked, blocks, tracked.local_tokens, end)
        self._loads.append(load)
        self._pinned[request.request_id] = found, load.all_filled
        self._tally.add(hits=1, hit_tokens=num_external, hits_in_step=int(load.is_in_step))
        if not found.is_exact:
            tracked.is_exact = False
            self._approximate.begins(request, tracked.local_tokens)

    def plan(self, output: Any) -> Plan:
        """What the workers move in this step of `SchedulerOutput`."""
        plan = Plan(loads=self._loads, is_idle=not output.total_num_scheduled_tokens)
        self._loads = []
        for load in plan.loads:
            plan.new_blocks |= load.all_filled
        computed = dict(self._scheduled(output, plan.new_blocks))
        late, self._at_risk = self._at_risk, []
        for each in late:
            # They may have ended since, and left their blocks to others.
            if plan.new_blocks.isdisjoint(each.blocks):
                self._save(plan, each.tracked, each.start, each.end)
        is_loading = any(load.is_in_step for load in plan.loads)
        for request, start in computed.items():
            tracked = self._requests.get(request)
            if tracked is None:
                continue
            # Drafts of speculative decoding are no tokens yet.
            end = start + output.num_scheduled_tokens[request]
            end = min(end, tracked.request.num_tokens)
            if is_loading:
                # Nobody knows yet whether what is computed now is right.
                self._at_risk.append(_AtRisk(tracked, tuple(tracked.blocks[0]), start, end))
            else:
                self._save(plan, tracked, start, end)
        return plan

    def loaded(self, ended: Iterable[str], failed: Iterable[str], bad_blocks: set[int]) -> None:
        """Loads have ended. Those in `failed`, and those into `bad_blocks`, are not tried again."""
        failed = set(failed)
        for request in ended:
            found, filled = self._pinned.pop(request, (Found(), set()))
            self._finder.let_go(found)
            tracked = self._requests.get(request)
            if tracked is not None and (request in failed or not filled.isdisjoint(bad_blocks)):
                tracked.has_failed = True

    def loaded_in_step(self, ended: Iterable[str], bad_blocks: set[int]) -> None:
        """The loads of the last step have ended. If they left `bad_blocks`, nobody goes on behind
        one of those, or finds what was computed there.
        """
        self.loaded(ended, (), bad_blocks)
        if not bad_blocks:
            self._num_failed_in_step = 0
        if not bad_blocks or self._evict is None:
            return
        evict, at_risk, self._at_risk = self._evict, self._at_risk, []
        self._num_failed_in_step += 1
        if self._num_failed_in_step >= STEP_FAILURES_MAX:
            log.warning("event=layer_by_layer_off reason='%d failed'", STEP_FAILURES_MAX)
            self._evict = None
        for tracked, blocks, _, _ in at_risk:
            first = next((at for at, block in enumerate(blocks) if block in bad_blocks), None)
            if first is not None:
                # vLLM does this for the first of several requests that share a block.
                good = first * self._engine.block_size
                request = tracked.request
                request.num_computed_tokens = min(request.num_computed_tokens, good)
                evict(set(blocks[first:]))

    def finished(self, request: Any) -> None:
        """The engine forgets the request; a load under way goes on."""
        self._admitted.discard(request.request_id)
        tracked = self._requests.pop(request.request_id, None)
        if tracked is not None:
            self._forget_answer(tracked)

    def forget_everything(self, epoch: bytes) -> None:
        """The engine's weights may be others now: nothing that was stored is found any more, and
        what requests have begun is not stored.
        """
        self._names.begin_anew(epoch)
        self._at_risk.clear()
        for name, tracked in self._requests.items():
            tracked.names.clear()
            self._forget_answer(tracked)
            if name in self._admitted:
                tracked.options = replace(tracked.options, store=False)

    def close(self) -> None:
        """Let all pins go."""
        for tracked in self._requests.values():
            if tracked.found is not None:
                tracked.found.release()
        for found, _ in self._pinned.values():
            found.release()
        self._finder.close()

    # Finding.

    def _forget_answer(self, tracked: _Tracked) -> None:
        question, tracked.question = tracked.question, None
        if question is not None:
            question.abandon()
        found, tracked.found = tracked.found, None
        if found is not None:
            self._finder.let_go(found)

    def _track(self, request: Any) -> _Tracked:
        tracked = self._requests.get(request.request_id)
        if tracked is None or tracked.request is not request:
            options, adapter = request_options(request.kv_transfer_params), b""
            try:
                adapter = adapter_of(request)
            except (OSError, Unsupported) as error:
                # Nobody knows whose KV it is.
                options = RequestOptions(load=False, store=False)
                log.warning("event=adapter_not_read reason=%r", str(error))
            tracked = _Tracked(request=request, options=options, blocks=(), adapter=adapter)
            self._requests[request.request_id] = tracked
        return tracked

    def _found(self, tracked: _Tracked) -> Found | None:
        if tracked.found is not None:
            if tracked.found.is_good:
                return tracked.found
            self._finder.let_go(tracked.found)
            tracked.found = None
        if tracked.question is None:
            names, tails = self._wanted(tracked)
            if not names and not tails(0):
                return Found(reason="short")
            tracked.question = self._finder.ask(names, tails)
            answer = tracked.question.answer(INLINE_S)
        else:
            answer = tracked.question.answer(0.0)
        if answer is not None:
            tracked.question = None
        return answer

    def _wanted(self, tracked: _Tracked) -> tuple[list[bytes], Tails]:
        """Names of a prompt's whole chunks, and the tails behind any number of them."""
        chunk_tokens, step = self._engine.chunk_tokens, self._engine.block_size
        num_tokens = tracked.request.num_tokens - self._engine.num_left_out
        num_tokens = min(num_tokens, self._names.num_tokens(tracked.request))
        names = self._chunk_names(tracked)[: min(num_tokens // chunk_tokens, KEYS_MAX)]
        # The finder's thread names them, when it knows how many chunks there are.
        name_of = self._names.namer(tracked.request, tracked.adapter)
        has_tails = self._options.store_tails

        def tails(start: int) -> list[tuple[int, bytes]]:
            if not has_tails or start // chunk_tokens >= KEYS_MAX:
                return []
            ends = range(start + step, min(num_tokens, start + chunk_tokens - 1) + 1, step)
            return [(end, name_of(end)) for end in ends][::-1]

        return names, tails

    def _chunk_names(self, tracked: _Tracked) -> list[bytes]:
        """Names of the whole chunks that the request has tokens for."""
        num_chunks = self._names.num_tokens(tracked.request) // self._engine.chunk_tokens
        for index in range(len(tracked.names), num_chunks):
            tracked.names.append(self._name(tracked, (index + 1) * self._engine.chunk_tokens))
        return tracked.names

    def _name(self, tracked: _Tracked, end: int) -> bytes:
        return self._names.name(tracked.request, tracked.adapter, end)

    def _miss(self, tracked: _Tracked, reason: str, detail: str = "") -> None:
        # A prompt that waits for room is looked at again and again.
        if not tracked.is_missed:
            tracked.is_missed = True
            self._tally.miss(reason, tracked.request.request_id, detail)

    # Loading.

    def _goes_in_step(self, tracked: _Tracked, found: Found, num_computed: int) -> bool:
        """Whether a load keeps nobody else waiting, and cannot wait itself. vLLM computes a token
        of every request of a step.
        """
        request, layout = tracked.request, self._engine.groups[0].layouts[0]
        size = layout.size(max(found.num_tokens - num_computed, 1))
        return (
            self._evict is not None
            and self._admitted <= {request.request_id}
            and found.num_tokens < request.num_tokens
            and size <= STEP_SIZE_MAX
            and found.is_in_memory
        )

    def _load(self, tracked: _Tracked, blocks: Blocks, start: int, end: int) -> Load:
        pieces = []
        for group in self._engine.groups:
            ends = [each for each in group.ends_needed(end) if each > start][::-1]
            found = [self._piece(tracked, group, each, blocks[group.index]) for each in ends]
            pieces.append(tuple(found))
        return Load(
            request=tracked.request.request_id,
            first_token=start,
            pieces=tuple(pieces),
            is_in_step=tracked.is_in_step,
        )

    def _piece(self, tracked: _Tracked, group: Group, end: int, blocks: Sequence[int]) -> Piece:
        start = group.first_useful(end)
        covered = blocks[start // group.block_size : end // group.block_size]
        return Piece(self._name(tracked, end), start, end, tuple(covered))

    # Saving.

    def _scheduled(self, output: Any, new_blocks: set[int]) -> Iterable[tuple[str, int]]:
        """The requests of a step, with how many of their tokens were computed before; their block
        tables are brought up to date on the way.
        """
        for new in output.scheduled_new_reqs:
            tracked = self._requests.get(new.req_id)
            if tracked is not None:
                tracked.blocks = tuple(list(ids) for ids in new.block_ids)
                for group in self._engine.groups:
                    own = new.num_computed_tokens // group.block_size
                    new_blocks.update(new.block_ids[group.index][own:])
            yield new.req_id, new.num_computed_tokens
        cached = output.scheduled_cached_reqs
        for index, request in enumerate(cached.req_ids):
            tracked, added = self._requests.get(request), cached.new_block_ids[index]
            if tracked is not None and added is not None:
                is_resumed = request in cached.resumed_req_ids
                if is_resumed:
                    tracked.blocks = tuple([] for _ in added)
                for ids, more in zip(tracked.blocks, added, strict=True):
                    ids.extend(more)
                for group in self._engine.groups:
                    # The blocks of one that comes back may begin with some that others have, too.
                    own = cached.num_computed_tokens[index] // group.block_size * is_resumed
                    new_blocks.update(added[group.index][own:])
            yield request, cached.num_computed_tokens[index]

    def _save(self, plan: Plan, tracked: _Tracked, start: int, end: int) -> None:
        """Have what is complete at `end` saved; `start` is where this step began."""
        if not (self._options.stores and tracked.options.store) or not tracked.blocks:
            return
        if not self._names.num_tokens(tracked.request):
            return
        request = tracked.request
        if not self._options.store_generated:
            end = min(end, request.num_prompt_tokens)
        chunk_tokens = self._engine.chunk_tokens
        num_chunks = len(self._chunk_names(tracked))
        last = min(end // chunk_tokens, num_chunks) * chunk_tokens
        ends = list(range(tracked.saved_tokens + chunk_tokens, last + 1, chunk_tokens))
        tail = self._tail(tracked, last, end)
        if tail:
            ends.append(tail)
        del ends[KEYS_MAX:]
        if not ends:
            return
        parent = tracked.saved_tokens
        tracked.saved_tokens = ends[-1] // chunk_tokens * chunk_tokens
        pieces = tuple(
            tuple(self._saved_pieces(tracked, group, ends, start)) for group in self._engine.groups
        )
        if not any(pieces):
            return
        name = self._name(tracked, parent) if parent else None
        save = Save(
            request=request.request_id,
            pieces=pieces,
            parents=tuple(name if group.kind == "full" else None for group in self._engine.groups),
            category=tracked.options.category or self._options.category,
            ttl_s=tracked.options.ttl_s,
            is_exact=self._is_exact(tracked, end),
        )
        plan.saves.append(save)
        if self._events is not None:
            for piece in pieces[0]:
                self._events.expect(piece.name, self._stored(tracked, piece))

    def _stored(self, tracked: _Tracked, piece: Piece) -> Stored:
        """What an event says of a piece when it is there."""
        request, size = tracked.request, self._engine.hash_block_size
        first, end = piece.start // size, piece.end // size
        lora = request.lora_request
        return Stored(
            hashes=request.block_hashes[first:end],
            parent=request.block_hashes[first - 1] if first else None,
            tokens=list(request.all_token_ids[piece.start : piece.end]),
            lora_name=lora.lora_name if lora else None,
        )

    def _tail(self, tracked: _Tracked, last: int, end: int) -> int:
        """Where the prompt's tail ends that is worth a piece of its own, once; 0 for none."""
        request, step = tracked.request, self._engine.block_size
        if tracked.has_saved_tail or not self._options.store_tails:
            return 0
        if end < request.num_prompt_tokens:
            return 0
        tracked.has_saved_tail = True
        tail = request.num_prompt_tokens // step * step
        return tail if tail > last and tail % self._engine.chunk_tokens else 0

    def _saved_pieces(
        self, tracked: _Tracked, group: Group, ends: Sequence[int], start: int
    ) -> Iterable[Piece]:
        for end in ends:
            piece = self._piece(tracked, group, end, tracked.blocks[group.index])
            # What left the window before this step is others' by now.
            kept = 0 if group.kind == "full" else max(start - group.window + 1, 0)
            is_kept = piece.start >= kept // group.block_size * group.block_size
            is_there = len(piece.blocks) * group.block_size == piece.num_tokens
            # Block 0 stands for those that a group does not keep.
            if piece.num_tokens and is_kept and is_there and 0 not in piece.blocks:
                yield piece
            elif group.kind == "full":
                return

    def _is_exact(self, tracked: _Tracked, end: int) -> bool:
        """Whether nothing before `end` is approximate, or computed on top of it, in this engine."""
        tracked.is_exact = tracked.is_exact and not self._approximate.touches(tracked.request, end)
        return tracked.is_exact
