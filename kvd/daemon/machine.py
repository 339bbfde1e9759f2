"""What the kernel says about this machine.

Each reader takes the root under which /proc and /sys lie, and none raises: what cannot be read is
None, or zero where that is the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/")

# cgroup v1 has no word for "no limit", only a number near 2**63.
_LIMIT_MAX = 1 << 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes of host memory; `limit` is what the cgroup allows, None without one."""

    total: int
    available: int
    limit: int | None

    @property
    def usable(self) -> int:
        """The most that one process can ever have."""
        return self.total if self.limit is None else min(self.total, self.limit)


@dataclass(frozen=True, slots=True, kw_only=True)
class HugePagePool:
    """Explicit 2 MiB pages that an administrator reserved."""

    count: int
    num_free: int


def read_memory(root: Path = ROOT) -> Memory:
    """Total and available memory, and the tightest limit of the cgroups this process is in."""
    found = {}
    for line in (read_text(root / "proc/meminfo") or "").splitlines():
        name, _, value = line.partition(":")
        digits = value.strip().removesuffix(" kB")
        if digits.isdigit():
            found[name] = int(digits) * 1024
    total = found.get("MemTotal", 0)
    limits = [
        int(text)
        for text in _cgroup_texts(root, "memory", v1="memory.limit_in_bytes", v2="memory.max")
        if text.isdigit() and int(text) < _LIMIT_MAX
    ]
    return Memory(
        total=total,
        available=found.get("MemAvailable", total),
        limit=min(limits) if limits else None,
    )


def read_huge_pages(root: Path = ROOT) -> HugePagePool:
    """The pool of 2 MiB pages."""
    directory = root / "sys/kernel/mm/hugepages/hugepages-2048kB"
    return HugePagePool(
        count=read_int(directory / "nr_hugepages") or 0,
        num_free=read_int(directory / "free_hugepages") or 0,
    )


def read_cpu_quota(root: Path = ROOT) -> float | None:
    """CPUs that the cgroup grants, None without a quota."""
    quotas = []
    for text in _cgroup_texts(root, "cpu", v1="", v2="cpu.max"):
        quota, _, period = text.partition(" ")
        if quota.isdigit() and period.isdigit() and int(period):
            quotas.append(int(quota) / int(period))
    return min(quotas) if quotas else None


def read_release(root: Path = ROOT) -> tuple[str, tuple[int, int]]:
    """The kernel's release, and its first two numbers; (0, 0) where it has none."""
    text = read_text(root / "proc/sys/kernel/osrelease") or ""
    parts = text.replace("-", ".").split(".")
    numbers = [int(part) for part in parts[:2] if part.isdigit()]
    return text, (numbers[0], numbers[1]) if len(numbers) == 2 else (0, 0)


def read_text(path: Path) -> str | None:
    """A small file of the kernel's without the blanks around it."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return None


def read_int(path: Path) -> int | None:
    """A file that holds one number."""
    text = read_text(path) or ""
    return int(text) if text.isdigit() else None


def _cgroup_texts(root: Path, controller: str, *, v1: str, v2: str) -> Iterator[str]:
    """What a control file says in this process's cgroup and in each above it, of both versions."""
    for line in (read_text(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if not controllers:
            bases, name = ["sys/fs/cgroup", "sys/fs/cgroup/unified"], v2
        elif controller in controllers.split(",") and v1:
            bases, name = [f"sys/fs/cgroup/{controller}"], v1
        else:
            continue
        # In a container the path may be the host's, or lead out of what is mounted: then only the
        # mount's root counts.
        parts = [part for part in path.split("/") if part]
        parts = [] if ".." in parts else parts
        for base in bases:
            for depth in range(len(parts), -1, -1):
                text = read_text(Path(root, base, *parts[:depth], name))
                if text is not None:
                    yield text
