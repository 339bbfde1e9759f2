"""What the daemon has of a prompt, asked on a thread of its own: the scheduler never waits for it
longer than a moment.

What is found is pinned until the load has ended, by every rank's key: a hit counts only as far as
every rank has it, and every group as much of it as it needs.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field

from kvd.client.client import split_parts
from kvd.client.connectors.late_answers import Rest
from kvd.client.connectors.late_client import LateClient
from kvd.client.connectors.vllm_identity import Engine, Group
from kvd.client.connectors.vllm_options import Options
from kvd.client.connectors.vllm_plan import key_of
from kvd.client.lease import Lease
from kvd.errors import DeadlineExceeded, KvdError
from kvd.proto.limits import KEYS_MAX

log = logging.getLogger("kvd.vllm")

# The answer usually comes within this: less than another step of the engine takes.
INLINE_S = 0.005

# How many ends of a hit are asked for at once where groups with a window lack their part of the
# longest: most often that is there, and if not, some shorter one may be much shorter.
ENDS_AT_ONCE = (1, 8, 64, 512)

# What a load may take longer than planned before its chunks can be evicted.
LEASE_MARGIN_S = 5.0

# A prompt that has to wait for room is looked at in every step; what was not there is asked for
# again after this long.
MISS_S = 0.5


@dataclass(slots=True, kw_only=True)
class Found:
    """The first `num_tokens` tokens of a prompt are pinned by `leases`. `reason` says why it is not
    more, where that is not that nobody stored it.
    """

    num_tokens: int = 0
    is_exact: bool = True
    reason: str = "absent"
    detail: str = ""
    leases: list[Lease] = field(default_factory=list)
    at_s: float = field(default_factory=time.monotonic)

    def release(self) -> None:
        """Let the chunks go."""
        leases, self.leases = self.leases, []
        for lease in leases:
            with suppress(KvdError):
                if not lease.is_released:
                    lease.release()

    @property
    def is_in_memory(self) -> bool:
        """Whether nothing of it has to come from a disk, or to be decoded."""
        return all(lease.is_ready(at) for lease in self.leases for at in range(len(lease)))

    @property
    def is_good(self) -> bool:
        """Whether it is still so, and the pins last for a load."""
        if not self.leases:
            return time.monotonic() < self.at_s + MISS_S
        return all(
            lease.deadline_ns - time.monotonic_ns() > LEASE_MARGIN_S * 0.5e9
            and not lease.is_released
            for lease in self.leases
        )


# Where pieces end that may stand behind so many tokens, the longest first, and their names.
Tails = Callable[[int], Sequence[tuple[int, bytes]]]


class Question:
    """One prompt's, under way or answered."""

    def __init__(
        self, future: Future[Found], give_up: float, let_go: Callable[[Found], None]
    ) -> None:
        self._future = future
        self._give_up = give_up
        self._let_go = let_go

    def answer(self, wait_s: float) -> Found | None:
        """What was found; None while that is not known. Too late is nothing."""
        with suppress(TimeoutError):
            return self._future.result(timeout=wait_s)
        if time.monotonic() < self._give_up:
            return None
        self.abandon()
        return Found(reason="slow")

    def abandon(self) -> None:
        """Nobody wants to know any more."""
        self._future.cancel()
        self._future.add_done_callback(self._let_go_of)

    def _let_go_of(self, future: Future[Found]) -> None:
        if not future.cancelled():
            self._let_go(future.result())


class Finder:
    """Asks `client`'s daemon for prompts of `engine`."""

    def __init__(self, client: LateClient, engine: Engine, options: Options) -> None:
        self._client = client
        self._engine = engine
        self._options = options
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="kvd-find")
        self._rest = Rest()

    def ask(self, names: Sequence[bytes], tails: Tails) -> Question:
        """Ask for a prompt: `names` of its whole chunks, and `tails`, the shorter pieces that may
        stand behind so many of its tokens: where they end, the longest first, and their names.
        """
        give_up = time.monotonic() + self._options.lookup_s
        future = self._thread.submit(self._find, names, tails, give_up)
        return Question(future, give_up, self.let_go)

    def let_go(self, found: Found) -> None:
        """Let the chunks go, without waiting: a release may stand behind a question in the same
        connection.
        """
        if found.leases:
            # After the end the session is over, and its pins with it.
            with suppress(RuntimeError):
                self._thread.submit(found.release)

    def close(self) -> None:
        """Ask no more."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _find(self, names: Sequence[bytes], tails: Tails, give_up: float) -> Found:
        found = Found()
        try:
            with self._rest.asking():
                self._pin_all(found, names, tails, give_up)
        except KvdError as error:
            found.release()
            is_slow = isinstance(error, DeadlineExceeded)
            return Found(reason="slow" if is_slow else "unavailable", detail=str(error))
        except Exception as error:
            # Whatever it is, it must not reach the engine, which is the one that waits for this.
            log.exception("event=lookup_failed")
            found.release()
            return Found(reason="unavailable", detail=repr(error))
        return found

    def _pin_all(
        self,
        found: Found,
        names: Sequence[bytes],
        tails: Tails,
        give_up: float,
    ) -> None:
        full = [group for group in self._engine.groups if group.kind == "full"]
        windows = [group for group in self._engine.groups if group.kind == "window"]
        chunk_tokens = self._engine.chunk_tokens
        end = len(names) * chunk_tokens
        for group in full:
            for rank in range(len(group.layouts)):
                count = self._pin_chain(found, group, rank, names, give_up)
                end = min(end, count * chunk_tokens)
        by_end = {(index + 1) * chunk_tokens: name for index, name in enumerate(names)}
        behind = tails(end)
        by_end |= dict(behind)
        tail_ends = self._common_tails(found, full, behind, give_up)
        ends = [*tail_ends, *range(end, 0, -chunk_tokens)]
        if windows:
            found.num_tokens = self._pin_windows(found, windows, ends, by_end, give_up)
        elif ends:
            found.num_tokens = ends[0]
        if windows and not full and found.num_tokens < end:
            # Only now it is known which chunk a shorter prompt's end would stand behind.
            behind = tails(found.num_tokens)
            tail_ends, by_end = [end for end, _ in behind], by_end | dict(behind)
            longer = self._pin_windows(found, windows, tail_ends, by_end, give_up)
            found.num_tokens = max(found.num_tokens, longer)
        found.is_exact = all(lease.all_exact for lease in found.leases)

    def _pin_chain(
        self, found: Found, group: Group, rank: int, names: Sequence[bytes], give_up: float
    ) -> int:
        """How many leading chunks a rank has."""
        layout = group.layouts[rank]
        keys = [key_of(layout, name) for name in names]
        count = 0
        for part in split_parts(keys) if keys else ():
            lease = self._pin(found, group, rank, part, give_up, standalone=False)
            count += len(lease)
            if len(lease) < len(part):
                break
        return count

    def _common_tails(
        self,
        found: Found,
        full: Sequence[Group],
        tails: Sequence[tuple[int, bytes]],
        give_up: float,
    ) -> list[int]:
        """Ends of the tails that every rank has, the longest first."""
        ends = [end for end, _ in tails]
        for group in full if tails else ():
            for rank, layout in enumerate(group.layouts):
                keys = {key_of(layout, name): end for end, name in tails if end in ends}
                lease = self._pin(found, group, rank, list(keys), give_up, standalone=True)
                ends = [keys[key] for key in lease.keys]
                if not ends:
                    return []
        return ends

    def _pin_windows(
        self,
        found: Found,
        windows: Sequence[Group],
        ends: Sequence[int],
        names: dict[int, bytes],
        give_up: float,
    ) -> int:
        """The first of `ends` at which all groups with a window can go on, with what they need
        pinned; 0 if there is none.
        """
        for at_once in (*ENDS_AT_ONCE, KEYS_MAX):
            tried, ends = ends[:at_once], ends[at_once:]
            while tried:
                asked = Found()
                try:
                    good = self._good_ends(asked, windows, tried, names, give_up)
                except BaseException:
                    asked.release()
                    raise
                if good and len(tried) == 1:
                    found.leases += asked.leases
                    return good[0]
                # Only what is needed stays pinned.
                asked.release()
                tried = good[:1]
        return 0

    def _good_ends(
        self,
        found: Found,
        windows: Sequence[Group],
        ends: Sequence[int],
        names: dict[int, bytes],
        give_up: float,
    ) -> list[int]:
        """Those of `ends` for which every rank has what the groups with a window need; all that is
        there of it is pinned.
        """
        good = list(ends)
        for group in windows:
            needed = {end: [names[each] for each in group.ends_needed(end)] for end in good}
            for rank, layout in enumerate(group.layouts):
                wanted = dict.fromkeys(name for end in good for name in needed[end])
                if not wanted:
                    return good
                keys = [key_of(layout, name) for name in wanted]
                lease = self._pin(found, group, rank, keys, give_up, standalone=True)
                there = set(lease.keys)
                good = [
                    end
                    for end in good
                    if all(key_of(layout, name) in there for name in needed[end])
                ]
        return good

    def _pin(
        self,
        found: Found,
        group: Group,
        rank: int,
        keys: Sequence[bytes],
        give_up: float,
        *,
        standalone: bool,
    ) -> Lease:
        lease = self._client.pin(
            group.layouts[rank],
            keys,
            standalone=standalone,
            exact=self._options.exact_only,
            wait=False,
            wait_s=0.0,
            lease_s=self._options.lookup_s + self._options.load_s + LEASE_MARGIN_S,
            timeout_s=max(give_up - time.monotonic(), 0.001),
        )
        # One that pins nothing is over from the start.
        if len(lease):
            found.leases.append(lease)
        return lease
