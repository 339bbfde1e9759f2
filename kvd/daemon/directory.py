"""Directory: which chunks are here. A dict, and for each chunk the tree of prefixes that its
chained key encodes.

A chunk is *rooted* when every chunk before it is here too, back to the layout's fingerprint. What
leaves takes the root from all that continues it, so of a chain of keys the first ones are rooted
and the rest is not: the longest known prefix is found by bisection, in ten probes for 128k tokens
however many chunks there are.

    fingerprint ◄─ A ◄─ B ◄─ C        rooted: A B C E      match([A, B, C, D]) == 3
                   ▲         D (not here)
                   └─ E       ▲
                              F        here, but not rooted: nobody can use F before D comes back
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

from kvd.chunk import ChunkMeta, Placement
from kvd.daemon.expiries import Expiries, Expiry
from kvd.keys import ChunkKey, PackedKeys


class Entry:
    """A chunk that is here: what it is, where its copies are, and what keeps it here.

    `in_memory` is the copy that clients map, `packed` an encoded one in memory of the daemon's own,
    `on_disk` the durable one; a listed chunk has one or more of them. `uses` counts how often it
    was asked for, its store being the first; `is_recent` says that it was asked for since its copy
    was written to disk. `children` is None, the one child, or a set of them: most chunks have one,
    and a set each would cost 200 bytes.
    """

    __slots__ = (
        "children",
        "in_memory",
        "is_held",
        "is_recent",
        "is_rooted",
        "meta",
        "on_disk",
        "packed",
        "parent",
        "pins",
        "uses",
    )

    def __init__(
        self,
        meta: ChunkMeta,
        in_memory: Placement | None = None,
        *,
        on_disk: Placement | None = None,
    ) -> None:
        self.meta = meta
        self.in_memory = in_memory
        self.on_disk = on_disk
        self.packed: Placement | None = None
        self.parent: Entry | None = None
        self.children: Entry | set[Entry] | None = None
        self.pins = 0
        self.uses = 1
        self.is_held = False
        self.is_recent = False
        self.is_rooted = False

    @property
    def placement(self) -> Placement:
        """The copy that is read first."""
        found = self.in_memory or self.packed or self.on_disk
        assert found is not None
        return found

    @property
    def is_backed(self) -> bool:
        """It can leave the memory that clients map, and come back."""
        return self.packed is not None or self.on_disk is not None

    @property
    def size(self) -> int:
        """Bytes of the chunk as it is kept."""
        return self.placement.extent.size

    @property
    def is_pinned(self) -> bool:
        """Somebody reads it, or an operator holds it."""
        return self.pins > 0 or self.is_held

    @property
    def is_leaf(self) -> bool:
        """No chunk here continues this one."""
        return self.children is None

    @property
    def is_leaf_in_memory(self) -> bool:
        """No chunk in memory continues this one."""
        return not any(child.in_memory is not None for child in _as_children(self.children))

    def descendants(self) -> Iterator[Entry]:
        """This entry and all that continue it, each before its own parent."""
        stack: list[Entry] = [self]
        ordered: list[Entry] = []
        while stack:
            entry = stack.pop()
            ordered.append(entry)
            stack.extend(_as_children(entry.children))
        return reversed(ordered)


class Directory:
    """Entries by key. Pure bookkeeping: no bytes, no clock, no I/O."""

    def __init__(self) -> None:
        # When those end that were stored for a time only.
        self.expiries = Expiries()
        self._entries: dict[ChunkKey, Entry] = {}
        # Entries that are not rooted, by the key of the parent that they wait for. They have no
        # links, so that clients that lie about parents can make no cycle.
        self._waiting: dict[bytes, dict[Entry, None]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: ChunkKey) -> bool:
        return key in self._entries

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries.values())

    def get(self, key: ChunkKey) -> Entry | None:
        """The entry of `key`, or None."""
        return self._entries.get(key)

    def match(self, keys: Sequence[ChunkKey] | PackedKeys) -> int:
        """How many of the first `keys`, a chain in order, are here. O(log len(keys)).

        Keys that are no chain get a number that means nothing; `pin` looks at each key, so no wrong
        byte follows.
        """
        low, high = 0, len(keys)
        while low < high:
            middle = (low + high) // 2
            entry = self._entries.get(keys[middle])
            if entry is not None and entry.is_rooted:
                low = middle + 1
            else:
                high = middle
        return low

    def finder(self, now_ns: int) -> Callable[[ChunkKey], Entry | None]:
        """`get` for whoever asks at that time: what is over by then is not here."""
        if not self.expiries.is_due(now_ns):
            return self._entries.get
        return partial(self._find, now_ns)

    def insert(self, entry: Entry, expiry: Expiry | None = None) -> None:
        """List an entry that is not listed, until `expiry`; entries that waited for it become
        rooted with it.
        """
        assert entry.meta.key not in self._entries
        self._entries[entry.meta.key] = entry
        self._link(entry)
        self.expiries.begin(entry, expiry)

    def _find(self, now_ns: int, key: ChunkKey) -> Entry | None:
        entry = self._entries.get(key)
        if entry is not None and self.expiries.is_over(entry, now_ns):
            return None
        return entry

    def _link(self, entry: Entry) -> None:
        meta = entry.meta
        if meta.parent is None or meta.parent == meta.layout:
            self._root(entry, None)
            return
        parent = self._entries.get(ChunkKey(meta.parent))
        if parent is not None and parent.is_rooted:
            self._root(entry, parent)
        else:
            self._waiting.setdefault(meta.parent, {})[entry] = None

    def remove(self, entry: Entry) -> None:
        """Unlist a chunk. Those that continue it stay, unrooted: nobody finds them by a lookup
        until it comes back.
        """
        if not entry.is_leaf:
            self._unroot(entry)
        self.expiries.forget(entry)
        del self._entries[entry.meta.key]
        if entry.parent is not None:
            _drop_child(entry.parent, entry)
            entry.parent = None
        if not entry.is_rooted:
            assert entry.meta.parent is not None
            waiting = self._waiting[entry.meta.parent]
            del waiting[entry]
            if not waiting:
                del self._waiting[entry.meta.parent]

    def _unroot(self, root: Entry) -> None:
        for entry in root.descendants():
            entry.children = None
            if entry is not root:
                entry.parent = None
                entry.is_rooted = False
                assert entry.meta.parent is not None
                self._waiting.setdefault(entry.meta.parent, {})[entry] = None

    def _root(self, entry: Entry, parent: Entry | None) -> None:
        stack = [(entry, parent)]
        while stack:
            entry, parent = stack.pop()
            entry.is_rooted = True
            if parent is not None:
                entry.parent = parent
                _add_child(parent, entry)
            stack.extend((waiting, entry) for waiting in self._waiting.pop(entry.meta.key, ()))

    def check(self) -> None:
        """Assert that links, roots and waiting lists agree. O(n), for audits and tests."""
        for key, entry in self._entries.items():
            meta = entry.meta
            assert meta.key == key
            if meta.parent is None or meta.parent == meta.layout:
                assert entry.is_rooted
                assert entry.parent is None
            else:
                parent = self._entries.get(ChunkKey(meta.parent))
                assert entry.is_rooted == (parent is not None and parent.is_rooted)
                assert entry.parent is (parent if entry.is_rooted else None)
            assert entry.parent is None or entry in _as_children(entry.parent.children)
            for child in _as_children(entry.children):
                assert child.parent is entry
                assert self._entries.get(child.meta.key) is child
        waiting = [entry for entries in self._waiting.values() for entry in entries]
        assert all(self._entries[entry.meta.key] is entry for entry in waiting)
        assert len(waiting) == sum(not entry.is_rooted for entry in self)
        self.expiries.check(self)


def with_ancestors(entries: Iterable[Entry]) -> set[Entry]:
    """The entries and all that they continue."""
    found: set[Entry] = set()
    for entry in entries:
        ancestor: Entry | None = entry
        while ancestor is not None and ancestor not in found:
            found.add(ancestor)
            ancestor = ancestor.parent
    return found


def _as_children(children: Entry | set[Entry] | None) -> Sequence[Entry] | set[Entry]:
    if children is None:
        return ()
    return children if isinstance(children, set) else (children,)


def _add_child(parent: Entry, child: Entry) -> None:
    if parent.children is None:
        parent.children = child
    elif isinstance(parent.children, set):
        parent.children.add(child)
    else:
        parent.children = {parent.children, child}


def _drop_child(parent: Entry, child: Entry) -> None:
    if isinstance(parent.children, set):
        parent.children.remove(child)
        if not parent.children:
            parent.children = None
    else:
        assert parent.children is child
        parent.children = None
