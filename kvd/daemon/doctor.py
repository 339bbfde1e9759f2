"""Doctor: what this machine offers, what kvd makes of it, and what would make it better.

Each examination looks at one thing and never raises. Those that read /proc and /sys take the root
they lie under.
"""

from __future__ import annotations

import fcntl
import os
import resource
from collections.abc import Iterator
from pathlib import Path

from kvd.daemon import machine
from kvd.daemon.devices import (
    default_disk,
    examine_daemon,
    examine_disk,
    examine_gpus,
    examine_rdma,
)
from kvd.daemon.finding import Finding, Verdict
from kvd.daemon.machine import ROOT, read_text
from kvd.proto.address import default_socket
from kvd.sizes import format_size

HUGE_PAGE_SIZE = 2 << 20

# Below this an arena holds the KV of one long prompt and not much more.
USEFUL_SIZE_MIN = 1 << 30

# Sessions, gRPC streams and segment files, with room.
OPEN_FILES_MIN = 1024


def examine(
    root: Path = ROOT, *, attach: Path | None = None, disk: Path | None = None
) -> list[Finding]:
    """All findings, what matters most first.

    `attach` is a daemon's socket, `disk` the directory where a tier on NVMe would be.
    """
    return [
        examine_memory(root),
        *examine_huge_pages(root),
        examine_kernel(root),
        examine_memfd(),
        examine_shm(),
        examine_cpus(root),
        examine_numa(root),
        *examine_gpus(),
        examine_rdma(root),
        examine_memlock(),
        examine_open_files(),
        *examine_disk(disk or default_disk(), root),
        examine_daemon(attach or default_socket()),
    ]


def worst(findings: list[Finding]) -> Verdict:
    """The worst verdict of all."""
    verdicts = {finding.verdict for finding in findings}
    return "bad" if "bad" in verdicts else "warn" if "warn" in verdicts else "ok"


def suggested_size(root: Path = ROOT) -> int:
    """Half of the memory that is free to take, for engines need some too; or all reserved pages."""
    memory = machine.read_memory(root)
    half = min(memory.available, memory.usable) // 2
    step = 1 << 30 if half >= 2 << 30 else 64 << 20
    reserved = machine.read_huge_pages(root).num_free * HUGE_PAGE_SIZE
    return max(half // step * step, reserved, HUGE_PAGE_SIZE)


def examine_memory(root: Path = ROOT) -> Finding:
    """How much memory there is, and how much of it the arena should have."""
    memory = machine.read_memory(root)
    value = f"{format_size(memory.total)}, {format_size(memory.available)} available"
    if memory.limit is not None and memory.limit < memory.total:
        value += f", cgroup limit {format_size(memory.limit)}"
    size = suggested_size(root)
    flag = f"kvd start --cpu-size {format_size(size).replace(' ', '')}"
    if size < USEFUL_SIZE_MIN:
        advice = f"little: a long prompt's KV takes gigabytes; `{flag}` would fit"
        return Finding(name="memory", value=value, verdict="warn", advice=advice)
    return Finding(name="memory", value=value, verdict="ok", advice=f"`{flag}` fits well")


def examine_huge_pages(root: Path = ROOT) -> Iterator[Finding]:
    """Explicit 2 MiB pages, and what shared memory gets without them."""
    pool = machine.read_huge_pages(root)
    wanted = suggested_size(root) // HUGE_PAGE_SIZE
    is_enough = pool.num_free >= wanted
    yield Finding(
        name="huge pages",
        value=f"{pool.num_free} of {pool.count} free",
        verdict="ok" if is_enough else "warn",
        advice="enough for the suggested arena"
        if is_enough
        else f"`sysctl vm.nr_hugepages={pool.count - pool.num_free + wanted}` reserves 2 MiB pages "
        "for the suggested arena: it starts and maps faster with them",
    )
    mode = read_text(root / "sys/kernel/mm/transparent_hugepage/shmem_enabled") or ""
    chosen = mode.partition("[")[2].partition("]")[0] or "not there"
    # MADV_COLLAPSE makes huge pages whatever the setting, "deny" excepted.
    can_collapse = machine.read_release(root)[1] >= (6, 1) and chosen not in ("deny", "not there")
    is_huge = can_collapse or chosen in ("always", "within_size", "force")
    yield Finding(
        name="transparent huge pages",
        value=f"shared memory: {chosen}",
        verdict="ok" if is_huge or is_enough else "warn",
        advice="the arena gets huge pages where memory is not fragmented"
        if is_huge
        else "the arena has 4 KiB pages where none of 2 MiB are reserved; `echo within_size > "
        "/sys/kernel/mm/transparent_hugepage/shmem_enabled` is the other way to huge ones",
    )


def examine_kernel(root: Path = ROOT) -> Finding:
    """The kernel's version, for what needs a recent one."""
    release, version = machine.read_release(root)
    if version < (3, 17):
        advice = "sealed memory needs Linux 3.17: kvd cannot run here"
        return Finding(name="kernel", value=release or "unknown", verdict="bad", advice=advice)
    if version < (5, 14):
        advice = "before 5.14 the arena is populated page by page: the start takes longer"
        return Finding(name="kernel", value=release, verdict="warn", advice=advice)
    return Finding(name="kernel", value=release, verdict="ok", advice="populates memory in bulk")


def examine_memfd() -> Finding:
    """Whether this process may make what an arena is: a sealed piece of anonymous shared memory."""
    try:
        fd = os.memfd_create("kvd-doctor", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, 4096)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        finally:
            os.close(fd)
    except OSError as error:
        advice = "the arena cannot be made; look at vm.memfd_noexec and the seccomp profile"
        value = error.strerror or str(error)
        return Finding(name="sealed memory", value=value, verdict="bad", advice=advice)
    advice = "the arena can be shared and cannot shrink under anybody"
    return Finding(name="sealed memory", value="works", verdict="ok", advice=advice)


def examine_shm() -> Finding:
    """Said because people look for it."""
    advice = "the arena is no file: the size of /dev/shm and --shm-size do not matter"
    return Finding(name="/dev/shm", value="not used", verdict="ok", advice=advice)


def examine_cpus(root: Path = ROOT) -> Finding:
    """CPUs that this process may run on."""
    count = len(os.sched_getaffinity(0))
    quota = machine.read_cpu_quota(root)
    value = f"{count}" + (f", cgroup quota {quota:g}" if quota is not None else "")
    if quota is not None and quota < 1:
        advice = "less than one CPU: every answer waits for the next period; raise the quota to 1"
        return Finding(name="cpus", value=value, verdict="warn", advice=advice)
    return Finding(name="cpus", value=value, verdict="ok", advice="the daemon needs a part of one")


def examine_numa(root: Path = ROOT) -> Finding:
    """Memory nodes: the arena lies where the daemon touches it first."""
    count = len(list((root / "sys/devices/system/node").glob("node[0-9]*")))
    if count > 1:
        advice = (
            "start one daemon a node under `numactl --cpunodebind=N --membind=N`, near the GPUs "
            "that use it: copies across nodes are slower"
        )
        return Finding(name="numa nodes", value=str(count), verdict="warn", advice=advice)
    return Finding(
        name="numa nodes", value=str(count or 1), verdict="ok", advice="all memory is near"
    )


def examine_memlock() -> Finding:
    """How much memory this process may lock, which RDMA registration counts against."""
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if limit == resource.RLIM_INFINITY:
        advice = "the arena can be registered with a network card"
        return Finding(name="locked memory", value="unlimited", verdict="ok", advice=advice)
    advice = "matters for RDMA only: the whole arena counts (`ulimit -l unlimited`, LimitMEMLOCK=)"
    return Finding(name="locked memory", value=format_size(limit), verdict="ok", advice=advice)


def examine_open_files() -> Finding:
    """How many files this process may have open."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit == resource.RLIM_INFINITY:
        return Finding(name="open files", value="unlimited", verdict="ok", advice="enough")
    if limit < OPEN_FILES_MIN:
        advice = f"each client takes one; `ulimit -n {OPEN_FILES_MIN}` or LimitNOFILE="
        return Finding(name="open files", value=str(limit), verdict="warn", advice=advice)
    return Finding(name="open files", value=str(limit), verdict="ok", advice="enough")
