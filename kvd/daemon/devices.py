"""What the doctor finds beyond CPU and memory: GPUs, RDMA, disks, and a daemon that runs."""

from __future__ import annotations

import errno
import mmap
import os
import socket
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

from kvd.daemon.finding import Finding, Verdict
from kvd.daemon.machine import ROOT, read_int, read_text
from kvd.sizes import format_size

BLOCK_SIZE = 4096


def examine_gpus() -> Iterator[Finding]:
    """GPUs, as the NVIDIA driver tells."""
    try:
        import pynvml
    except ImportError:
        advice = "nvidia-ml-py is not installed, so nobody looked; `pip install nvidia-ml-py`"
        yield Finding(name="gpu", value="unknown", verdict="warn", advice=advice)
        return
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        advice = "fine for the daemon, which needs none; in a container, engines need --gpus all"
        yield Finding(name="gpu", value=f"no GPU ({error})", verdict="ok", advice=advice)
        return
    try:
        driver = _text(pynvml.nvmlSystemGetDriverVersion())
        for index in range(pynvml.nvmlDeviceGetCount()):
            gpu = pynvml.nvmlDeviceGetHandleByIndex(index)
            size = pynvml.nvmlDeviceGetMemoryInfo(gpu).total
            value = f"{_text(pynvml.nvmlDeviceGetName(gpu))}, {format_size(int(size))}"
            advice = f"driver {driver}; engines copy between it and the arena themselves"
            yield Finding(name=f"gpu {index}", value=value, verdict="ok", advice=advice)
    except pynvml.NVMLError as error:
        advice = "the driver is there but does not answer; see `nvidia-smi` and the kernel's log"
        yield Finding(name="gpu", value=str(error), verdict="warn", advice=advice)
    finally:
        pynvml.nvmlShutdown()


def examine_rdma(root: Path = ROOT) -> Finding:
    """Devices for one-sided transfers between nodes."""
    found, is_active = [], False
    for device in sorted((root / "sys/class/infiniband").glob("*")):
        for port in sorted((device / "ports").glob("*")):
            state = (read_text(port / "state") or "").rpartition(" ")[2].lower()
            link = read_text(port / "link_layer") or "?"
            found.append(f"{device.name}:{port.name} {link} {state}")
            is_active = is_active or state == "active"
    if not found:
        advice = "transfers between nodes go over TCP"
        return Finding(name="rdma", value="no device", verdict="ok", advice=advice)
    advice = "usable between nodes" if is_active else "no port is active: cable, switch or driver"
    verdict: Verdict = "ok" if is_active else "warn"
    return Finding(name="rdma", value=", ".join(found), verdict=verdict, advice=advice)


def default_disk(uid: int | None = None) -> Path:
    """Where chunks on NVMe would lie if nobody says otherwise."""
    uid = os.geteuid() if uid is None else uid
    return Path("/var/lib/kvd") if uid == 0 else Path.home() / ".cache" / "kvd"


def examine_disk(path: Path, root: Path = ROOT) -> Iterator[Finding]:
    """The file system that `path` lies or would lie on, for a tier on NVMe."""
    place = path.absolute()
    while not place.is_dir():
        place = place.parent
    status = os.statvfs(place)
    free = format_size(status.f_bavail * status.f_frsize)
    kind, is_spinning = _disk_kind(place, root)
    yield Finding(
        name="disk",
        value=f"{free} free at {place}, {kind}",
        verdict="warn" if is_spinning else "ok",
        advice="a disk that turns is slower than computing KV anew"
        if is_spinning
        else f"chunks on disk would lie in {path}",
    )
    reason = _direct_failure(place)
    yield Finding(
        name="direct I/O",
        value=reason or "works",
        verdict="warn" if reason else "ok",
        advice=f"no tier on disk at {path}: give it a file system like XFS or ext4"
        if reason
        else "reads and writes can pass by the page cache",
    )


def examine_daemon(path: Path) -> Finding:
    """Whether somebody listens at the attach socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC) as peer:
        peer.settimeout(1.0)
        try:
            peer.connect(str(path))
            packed = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        except OSError as error:
            return _daemon_failure(path, error)
    pid, uid, _ = struct.unpack("3i", packed)
    advice = "`kvd status` asks it how it is"
    value = f"pid {pid} of user {uid} at {path}"
    return Finding(name="daemon", value=value, verdict="ok", advice=advice)


def _daemon_failure(path: Path, error: OSError) -> Finding:
    verdict: Verdict = "warn"
    if error.errno == errno.ECONNREFUSED:
        value = f"gone, its socket is still at {path}"
        advice = "it ended without cleaning up; `kvd start` takes the socket over"
    elif error.errno in (errno.EACCES, errno.EPERM):
        value = f"at {path}, closed to user {os.geteuid()}"
        advice = "start it with a --socket-group that you are a member of"
    elif error.errno in (errno.ENOENT, errno.ENOTDIR):
        value, verdict, advice = f"none at {path}", "ok", "`kvd start` starts one"
    else:
        value = f"{path}: {error.strerror or error}"
        advice = "something else is there; name the daemon's socket with --socket"
    return Finding(name="daemon", value=value, verdict=verdict, advice=advice)


def _disk_kind(place: Path, root: Path) -> tuple[str, bool]:
    """What the disk under `place` is, and whether it turns."""
    device = place.stat().st_dev
    block = root / f"sys/dev/block/{os.major(device)}:{os.minor(device)}"
    # A partition has its disk's queue one directory up.
    for directory in (block, block.resolve().parent):
        rotational = read_int(directory / "queue/rotational")
        if rotational is not None:
            name = directory.resolve().name
            if name.startswith(("vd", "xvd")):
                # A hypervisor's disk says that it turns, whatever it is made of.
                return "virtual disk", False
            kind = "NVMe" if name.startswith("nvme") else "solid state"
            return "a disk that turns" if rotational else kind, bool(rotational)
    return "kind unknown", False


def _direct_failure(place: Path) -> str:
    """Why a block cannot be written past the page cache at `place`; empty if it can."""
    try:
        with (
            tempfile.TemporaryDirectory(prefix=".kvd-doctor-", dir=place) as directory,
            mmap.mmap(-1, BLOCK_SIZE) as block,
        ):
            flags = os.O_WRONLY | os.O_CREAT | os.O_DIRECT | os.O_CLOEXEC
            fd = os.open(Path(directory, "block"), flags, 0o600)
            try:
                os.write(fd, block)
            finally:
                os.close(fd)
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
