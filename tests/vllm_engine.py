"""A small engine that drives the vLLM connector's two sides as vLLM does, and checks every byte.

It has what a connector can trip over: a pool of blocks that are used again; a prefix cache of its
own; prefill in parts; preemption; windows whose blocks are freed when they have passed; loads that
end steps later, or in the step itself, or fail; aborts at any time; steps that are planned before
the last one's tokens are known; drafts that are not taken.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from logging import getLogger
from typing import Any, NamedTuple

import numpy as np

from kvd.client.connectors.late_client import LateClient
from kvd.client.connectors.vllm_finder import Finder
from kvd.client.connectors.vllm_identity import engine_of
from kvd.client.connectors.vllm_options import Options
from kvd.client.connectors.vllm_plan import Plan
from kvd.client.connectors.vllm_scheduler import SchedulerSide
from kvd.client.connectors.vllm_stats import Tally
from kvd.client.connectors.vllm_worker import WorkerSide
from tests.vllm_caches import Caches
from tests.vllm_fakes import Model, NewRequest, SchedulerOutput, kv_cache_config, vllm_config
from tests.vllm_request import Pool, Request, Tables

# Steps after which requests that have not ended never will.
STEPS_MAX = 20_000


class Work(NamedTuple):
    """What a step computes of a request: tokens from `start` on, and drafts behind them."""

    request: Request
    start: int
    num_tokens: int
    num_drafts: int
    tables: Tables

    @property
    def num_right(self) -> int:
        """Tokens that are computed and stay."""
        return self.num_tokens + self.num_drafts // 2


class Reported(NamedTuple):
    """What the workers say after a step; `ended` has each worker's."""

    ended: list[set[str]]
    failed: set[str]
    bad_blocks: set[int]
    in_step: set[str]


class SmallEngine:
    """One scheduler, and a worker for each rank. `clients` makes the client of each."""

    def __init__(
        self,
        model: Model,
        clients: Callable[[], LateClient],
        options: Options,
        *,
        num_blocks: int = 64,
        budget: int = 1000,
        has_prefix_cache: bool = False,
        is_ahead: bool = False,
        num_drafts: int = 0,
        loads_in_step: bool = False,
    ) -> None:
        assert not (is_ahead and num_drafts)
        self.model = model
        self.pool = Pool(num_blocks)
        config = vllm_config(model, plans_ahead=is_ahead)
        self.engine = engine_of(config, kv_cache_config(model), options)
        self.tally = Tally(getLogger("tests.vllm"))
        self.caches = [Caches(model, num_blocks, rank) for rank in range(model.num_ranks)]
        self._clients = [clients() for _ in range(1 + model.num_ranks)]
        finder = Finder(self._clients[0], self.engine, options)
        self.scheduler = SchedulerSide(self.engine, finder, options, self.tally)
        self.workers = [
            WorkerSide(self.engine, client, options, self.tally, each.by_layer(), rank=each.rank)
            for client, each in zip(self._clients[1:], self.caches, strict=True)
        ]
        if loads_in_step:
            self.scheduler.allow_in_step(self.pool.forget)
        self.budget = budget
        self.has_prefix_cache = has_prefix_cache
        self.is_ahead = is_ahead
        self.num_drafts = num_drafts
        # Those that hold blocks or wait for some, and all that there ever were.
        self.requests: dict[str, Request] = {}
        self.ever: list[Request] = []
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.num_loaded = 0
        self.num_loaded_in_step = 0
        self.num_failed = 0
        # What happens while a step is computed.
        self.meanwhile: list[Callable[[], None]] = []
        self.output = SchedulerOutput()
        self._work: list[Work] = []
        self._arrived: set[str] = set()
        self._failed: set[str] = set()
        self._ended: Counter[str] = Counter()
        self._pending: deque[tuple[list[Work], Reported]] = deque()

    # What users do.

    def add(self, prompt: Sequence[int], *, max_tokens: int = 1, **more: Any) -> Request:
        request = Request(
            request_id=str(len(self.ever)),
            tokens=list(prompt),
            num_prompt_tokens=len(prompt),
            max_tokens=max_tokens,
            block_size=self.model.block_size,
            **more,
        )
        self.requests[request.request_id] = request
        self.ever.append(request)
        self.waiting.append(request)
        return request

    def abort(self, request: Request) -> None:
        if request.status != "finished":
            self._finish(request)

    def preempt(self) -> None:
        """The request that came last leaves all its blocks."""
        if self.running:
            self._preempt(self.running[-1])

    def run(self, prompt: Sequence[int], **more: Any) -> Request:
        """Serve a request to its end."""
        request = self.add(prompt, **more)
        self.finish_all()
        return request

    def finish_all(self) -> None:
        """Step until there is no request."""
        for _ in range(STEPS_MAX):
            if not self.requests:
                break
            self.step()
        assert not self.requests, "requests that never end"
        while self._pending:
            self._update(*self._pending.popleft())

    def close(self) -> None:
        """The engine ends; what it saves is stored."""
        for worker in self.workers:
            worker.close()
        self.scheduler.close()
        for client in self._clients:
            client.close()

    # A step.

    def step(self) -> None:
        self.output, self._work = SchedulerOutput(), []
        self._schedule()
        reported = self._execute(self.scheduler.plan(self.output), self._work)
        self._pending.append((self._work, reported))
        while len(self._pending) > self.is_ahead:
            self._update(*self._pending.popleft())

    def _execute(self, plan: Plan, work: Sequence[Work]) -> Reported:
        for worker in self.workers:
            worker.saves.make_way(plan.new_blocks)
        if any(load.is_in_step for load in plan.loads):
            return self._execute_and_load(plan, work)
        self._compute(work)
        for worker in self.workers:
            worker.loads.start(plan.loads)
            worker.saves.start(plan.saves)
        return self._reported(plan)

    def _execute_and_load(self, plan: Plan, works: Sequence[Work]) -> Reported:
        """A step that computes each layer behind what is loaded of it."""
        for worker in self.workers:
            worker.loads.start(plan.loads)
        loading = {load.request for load in plan.loads if load.is_in_step}
        behind = [work for work in works if work.request.request_id in loading]
        are_there = []
        for place, name in enumerate(self.engine.groups[0].layer_names):
            for worker, caches in zip(self.workers, self.caches, strict=True):
                worker.loads.wait_for_layer(name)
                for work in behind:
                    hashes = work.request.hashes(0, work.start)
                    are_there.append(caches.has_layer(place, 0, work.tables[0], 0, hashes))
        for worker in self.workers:
            worker.saves.start(plan.saves)
        reported = self._reported(plan)
        assert reported.in_step == loading
        assert are_there, "a request was loaded and not computed"
        is_wrong = [bool(reported.bad_blocks.intersection(work.tables[0])) for work in works]
        assert all(are_there) or any(is_wrong), "a layer was computed before it was there"
        for work, wrong in zip(works, is_wrong, strict=True):
            if wrong:
                self._compute_wrong(work)
        self._compute([work for work, wrong in zip(works, is_wrong, strict=True) if not wrong])
        meanwhile, self.meanwhile = self.meanwhile, []
        for happen in meanwhile:
            happen()
        return reported

    def _reported(self, plan: Plan) -> Reported:
        results = [worker.loads.results(is_idle=plan.is_idle) for worker in self.workers]
        failed = set[str]().union(*(each.failed for each in results))
        bad_blocks = set[int]().union(*(each.bad_blocks for each in results))
        in_step = set[str]().union(*(each.in_step for each in results))
        return Reported([each.ended for each in results], failed, bad_blocks, in_step)

    def _compute_wrong(self, work: Work) -> None:
        """Behind blocks that hold nothing."""
        wrong = np.arange(1, work.num_tokens + work.num_drafts + 1, dtype=np.uint64)
        for caches in self.caches:
            caches.write(0, work.tables[0], work.start, wrong)

    def _compute(self, works: Sequence[Work]) -> None:
        for work in works:
            end = work.start + work.num_right
            # What is drafted and not taken leaves KV of tokens that are not there.
            wrong = np.arange(
                1, work.num_tokens + work.num_drafts - work.num_right + 1, dtype=np.uint64
            )
            for caches in self.caches:
                for group, table in enumerate(work.tables):
                    hashes = work.request.hashes(work.start, end)
                    caches.write(group, table, work.start, hashes)
                    caches.write(group, table, end, wrong)
        for work in works:
            self._assert_sees(work.request, work.start + work.num_right, work.start, work.tables)
        for caches in self.caches:
            caches.assert_nobody_wrote_to_none()

    def _assert_sees(self, request: Request, end: int, first: int, tables: Tables) -> None:
        """Up to `end` everything is there that the tokens from `first` on see."""
        for group, window in enumerate(self.model.windows):
            start = max(first - window + 1, 0) if window else 0
            for caches in self.caches if start < end else ():
                hashes = request.hashes(start, end)
                why = f"request {request.request_id} at {first}"
                caches.assert_holds(group, tables[group], start, hashes, why=why)

    def _update(self, work: Sequence[Work], reported: Reported) -> None:
        thrown_away = self._take_failures(work, reported)
        for each in work:
            if each.request not in thrown_away:
                self._take_tokens(each)
        ended = set()
        for name in (name for names in reported.ended for name in names):
            self._ended[name] += 1
            if self._ended[name] == len(self.workers):
                ended.add(name)
                del self._ended[name]
        self.scheduler.loaded(ended, reported.failed, reported.bad_blocks)
        if reported.in_step:
            self.scheduler.loaded_in_step(reported.in_step, reported.bad_blocks)
        for name in ended:
            # One that is not known ends vLLM.
            request = self.requests[name]
            if request.status == "loading":
                self._arrived.add(name)
            else:
                assert request.status == "finished"
                self._free(request)
                del self.requests[name]

    def _take_failures(self, works: Sequence[Work], reported: Reported) -> set[Request]:
        """What is done about loads that failed; the requests whose tokens are thrown away."""
        if self.engine.fails_as_a_whole:
            for request in (self.requests[name] for name in reported.failed):
                if request.status == "loading":
                    self.num_failed += 1
                    request.num_computed_tokens = 0
                    self._failed.add(request.request_id)
            return set()
        assert len(self.model.windows) == 1, "a block's number does not tell its group"
        for request in self.requests.values():
            size = self.model.block_size
            table = request.tables[0] if request.tables else []
            table = table[: -(-request.num_computed_tokens // size)]
            bad = [at for at, block in enumerate(table) if block in reported.bad_blocks]
            if bad and request.status == "loading":
                self.num_failed += 1
                request.num_computed_tokens = bad[0] * size
                self._failed.add(request.request_id)
            elif request.status != "finished":
                assert not bad or reported.in_step, "another request's block is called bad"
        return self._take_back(works, reported.bad_blocks)

    def _take_back(self, works: Sequence[Work], bad_blocks: set[int]) -> set[Request]:
        """As vLLM does it: of requests that share a bad block only the first is to compute it
        anew, and the others go on behind it.
        """
        size, marked, found = self.model.block_size, set[int](), set[Request]()
        for work in works:
            request = work.request
            table = work.tables[0][: -(-work.start // size)]
            bad = [at for at, block in enumerate(table) if block in bad_blocks]
            if not bad or request.status != "running":
                continue
            found.add(request)
            own = [at for at in bad if table[at] not in marked]
            request.num_computed_tokens = own[0] * size if own else work.start
            marked.update(table[at] for at in own)
            self.num_failed += bool(own)
        return found

    def _take_tokens(self, work: Work) -> None:
        request = work.request
        if request.status == "finished" or work.start + work.num_tokens != request.num_tokens:
            return
        num_taken = work.num_right - work.num_tokens
        request.say(1 + num_taken)
        request.num_computed_tokens += num_taken
        if request.num_tokens >= request.num_prompt_tokens + request.max_tokens:
            self._finish(request)

    # Scheduling.

    def _schedule(self) -> None:
        budget, is_preempting = self.budget, False
        for request in list(self.running):
            count = min(request.num_known - request.num_computed_tokens, budget)
            while count > 0 and request.status == "running":
                if self._grow(request, request.num_computed_tokens + count + self.num_drafts):
                    budget -= self._run(request, count)
                    break
                is_preempting = True
                self._preempt(self.running[-1])
        for request in list(self.waiting) if not is_preempting else ():
            budget -= self._admit(request, budget)

    def _admit(self, request: Request, budget: int) -> int:
        """How many tokens of a waiting request run in this step."""
        if request.status == "loading":
            if request.request_id not in self._arrived:
                return 0
            self._arrive(request)
        num_external, is_in_step = 0, False
        if request.tables:
            count = min(request.num_tokens - request.num_computed_tokens, budget)
            if not self._grow(request, request.num_computed_tokens + count + self.num_drafts):
                return 0
        else:
            num_own, tables = self._own_hit(request)
            found = self.scheduler.matched(request, num_own)
            if found is None:
                return 0
            num_external = 0 if request.skip_reading_prefix_cache else found
            assert 0 <= num_external <= request.num_tokens - num_own
            is_in_step = bool(num_external) and self.scheduler.is_in_step(request)
            # One that is part of the step and computes nothing in it ends vLLM.
            assert not is_in_step or num_own + num_external < request.num_tokens
            if is_in_step and not budget:
                return 0
            if not (num_external or budget) or not self._start(
                request, num_own, tables, num_external, budget, is_in_step=is_in_step
            ):
                return 0
        if not (num_external or budget):
            return 0
        self.scheduler.allocated(request, _copy(request.tables), num_external)
        self.num_loaded += bool(num_external)
        self.num_loaded_in_step += is_in_step
        if num_external and not is_in_step:
            request.status = "loading"
            return 0
        self.waiting.remove(request)
        self.running.append(request)
        request.status = "running"
        count = min(request.num_tokens - request.num_computed_tokens, budget)
        return self._run(request, count, is_new=True)

    def _start(
        self,
        request: Request,
        num_own: int,
        tables: Tables,
        num_external: int,
        budget: int,
        *,
        is_in_step: bool,
    ) -> bool:
        """Give a request its first blocks, if all of it fits beside those that have begun."""
        computed = num_own + num_external
        used = {block for table in tables for block in table if block in self.pool.free}
        begun = [each for each in self.requests.values() if each.tables]
        promised = sum(
            self._num_missing(each.num_tokens, each.num_computed_tokens, each.tables)
            for each in begun
        )
        missing = self._num_missing(request.num_tokens + self.num_drafts, computed, tables)
        if missing > len(self.pool.free) - len(used) - promised:
            return False
        for block in (block for table in tables for block in table):
            self.pool.touch(block)
        request.tables, request.num_computed_tokens = tables, computed
        count = min(request.num_tokens - computed, budget) + self.num_drafts
        if num_external and not is_in_step:
            count = 0
        assert self._grow(request, computed + count)
        return True

    def _grow(self, request: Request, num_tokens: int) -> bool:
        """Have blocks for so many tokens. Those that left a window are freed in any case."""
        in_flight = sum(
            work.num_tokens
            for works, _ in self._pending
            for work in works
            if work.request is request
        )
        computed = max(request.num_computed_tokens - in_flight, 0)
        for window, table in zip(self.model.windows, request.tables, strict=True):
            passed = self._num_passed(window, computed)
            for at in range(min(passed, len(table))):
                self.pool.give_back(table[at])
                table[at] = 0
            table += [0] * (passed - len(table))
        if self._num_missing(num_tokens, computed, request.tables) > len(self.pool.free):
            return False
        for table in request.tables:
            missing = -(-num_tokens // self.model.block_size) - len(table)
            table += [self.pool.take() for _ in range(missing)]
        return True

    def _num_missing(self, num_tokens: int, computed: int, tables: Tables) -> int:
        """Blocks that so many tokens need beyond those that are there."""
        wanted = -(-num_tokens // self.model.block_size)
        return sum(
            max(wanted - max(len(table), self._num_passed(window, computed)), 0)
            for window, table in zip(self.model.windows, tables, strict=True)
        )

    def _num_passed(self, window: int, computed: int) -> int:
        """Leading blocks that nobody sees who goes on at `computed`."""
        return max(computed - window + 1, 0) // self.model.block_size if window else 0

    def _run(self, request: Request, count: int, *, is_new: bool = False) -> int:
        name, start, output = request.request_id, request.num_computed_tokens, self.output
        tables, end = request.tables, start + count
        drafts = self.num_drafts if end == request.num_tokens else 0
        self._work.append(Work(request, start, count, drafts, list(_copy(tables))))
        output.num_scheduled_tokens[name] = count + drafts
        if is_new and not request.is_resumed:
            output.scheduled_new_reqs.append(
                NewRequest(req_id=name, block_ids=_copy(tables), num_computed_tokens=start)
            )
        else:
            told = [0] * len(tables) if is_new else request.num_told
            added = tuple(table[at:] for table, at in zip(tables, told, strict=True))
            cached = output.scheduled_cached_reqs
            cached.req_ids.append(name)
            cached.resumed_req_ids.update([name] if is_new else [])
            cached.new_block_ids.append(added if any(added) else None)
            cached.num_computed_tokens.append(start)
        request.num_told = [len(table) for table in tables]
        request.num_computed_tokens = end
        if end == request.num_known and self.is_ahead:
            request.num_promised = end + 1
        self._remember(request, min(end, request.num_tokens))
        return count + drafts

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self.waiting.insert(0, request)
        self._free(request)
        request.status, request.is_resumed = "waiting", True
        request.num_computed_tokens = request.num_promised = 0

    def _arrive(self, request: Request) -> None:
        """A load has ended: vLLM goes on behind it, or behind what of it is good."""
        self._arrived.remove(request.request_id)
        request.status = "waiting"
        end = request.num_computed_tokens
        if request.request_id in self._failed:
            self._failed.remove(request.request_id)
            if not end:
                self._free(request)
                return
        self._assert_sees(request, end, end, request.tables)
        self._remember(request, end)
        # The last token is computed in any case: somebody has to say what comes next.
        request.num_computed_tokens = min(end, request.num_tokens - 1)

    def _finish(self, request: Request) -> None:
        self.scheduler.finished(request)
        for requests in (self.waiting, self.running):
            if request in requests:
                requests.remove(request)
        is_loading = request.status == "loading" and request.request_id not in self._arrived
        request.status = "finished"
        self._arrived.discard(request.request_id)
        self._failed.discard(request.request_id)
        # What is still being loaded into is nobody else's.
        if not is_loading:
            self._free(request)
            del self.requests[request.request_id]

    def _free(self, request: Request) -> None:
        for table in request.tables:
            for block in reversed(table):
                self.pool.give_back(block)
        request.tables = []

    # The engine's own prefix cache.

    def _remember(self, request: Request, end: int) -> None:
        for group, table in enumerate(request.tables if self.has_prefix_cache else []):
            for at in range(end // self.model.block_size):
                self.pool.remember(group, request.block_hashes[at], table[at])

    def _own_hit(self, request: Request) -> tuple[int, Tables]:
        size = self.model.block_size
        longest = (request.num_tokens - 1) // size if self.has_prefix_cache else 0
        for count in range(longest, 0, -1):
            names = request.block_hashes[:count]
            tables = [
                self._own_blocks(group, names, self._num_passed(window, count * size))
                for group, window in enumerate(self.model.windows)
            ]
            if all(len(table) == count for table in tables):
                return count * size, tables
        return 0, [[] for _ in self.model.windows]

    def _own_blocks(self, group: int, names: Sequence[bytes], num_passed: int) -> list[int]:
        found = [self.pool.cached.get((group, name), 0) for name in names[num_passed:]]
        return [0] * num_passed + found if all(found) else []


def _copy(tables: Tables) -> tuple[list[int], ...]:
    return tuple(list(table) for table in tables)
