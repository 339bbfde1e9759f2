"""The doctor reads a machine as it is, and says what its findings mean."""

from __future__ import annotations

import os
import resource
import socket
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvd.daemon import devices, doctor, machine
from kvd.daemon.finding import Finding, Verdict
from kvd.daemon.preflight import check_machine

GIB = 1 << 30


def write(root: Path, files: dict[str, str]) -> Path:
    for path, text in files.items():
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
    return root


def meminfo(total: int, available: int) -> dict[str, str]:
    lines = f"MemTotal:       {total // 1024} kB\nMemAvailable:   {available // 1024} kB"
    return {"proc/meminfo": lines}


def limits(monkeypatch: pytest.MonkeyPatch, value: int) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (value, value))


class TestMachine:
    def test_what_is_not_there_is_nothing(self, tmp_path: Path) -> None:
        memory = machine.read_memory(tmp_path)
        assert (memory.total, memory.available, memory.limit) == (0, 0, None)
        assert machine.read_huge_pages(tmp_path).num_free == 0
        assert machine.read_cpu_quota(tmp_path) is None
        assert machine.read_release(tmp_path) == ("", (0, 0))

    def test_nonsense_is_nothing(self, tmp_path: Path) -> None:
        files = {
            "proc/meminfo": "MemTotal: many kB\nMemAvailable",
            "proc/self/cgroup": "nonsense\n0::\n::",
            "sys/fs/cgroup/memory.max": "-1",
            "sys/fs/cgroup/cpu.max": "100 0",
            "proc/sys/kernel/osrelease": "six.one",
        }
        write(tmp_path, files)
        assert machine.read_memory(tmp_path).usable == 0
        assert machine.read_cpu_quota(tmp_path) is None
        assert machine.read_release(tmp_path) == ("six.one", (0, 0))

    def test_this_machine_is_read(self) -> None:
        memory = machine.read_memory()
        assert 0 < memory.available <= memory.total
        assert machine.read_release()[1] >= (3, 17)

    def test_tightest_quota_counts(self, tmp_path: Path) -> None:
        files = {
            "proc/self/cgroup": "0::/pod/one",
            "sys/fs/cgroup/pod/cpu.max": "150000 100000",
            "sys/fs/cgroup/pod/one/cpu.max": "max 100000",
        }
        assert machine.read_cpu_quota(write(tmp_path, files)) == 1.5


class TestMemory:
    def test_half_of_what_is_available_is_suggested(self, tmp_path: Path) -> None:
        found = doctor.examine_memory(write(tmp_path, meminfo(64 * GIB, 50 * GIB)))
        assert found.value == "64 GiB, 50 GiB available"
        assert found.verdict == "ok"
        assert "`kvd start --cpu-size 25GiB`" in found.advice

    def test_cgroup_limit_is_shown_and_kept(self, tmp_path: Path) -> None:
        files = {"proc/self/cgroup": "0::/", "sys/fs/cgroup/memory.max": str(8 * GIB)}
        found = doctor.examine_memory(write(tmp_path, meminfo(64 * GIB, 50 * GIB) | files))
        assert found.value.endswith("cgroup limit 8 GiB")
        assert "--cpu-size 4GiB" in found.advice

    def test_little_memory_is_a_warning(self, tmp_path: Path) -> None:
        found = doctor.examine_memory(write(tmp_path, meminfo(GIB, GIB // 2)))
        assert found.verdict == "warn"
        assert "--cpu-size 256MiB" in found.advice

    @pytest.mark.parametrize("available", [0, 1 << 20, 3 * GIB, 1000 * GIB])
    def test_suggested_size_can_be_started_with(self, available: int, tmp_path: Path) -> None:
        from kvd.daemon.config import Config

        root = write(tmp_path, meminfo(1024 * GIB, available))
        size = doctor.suggested_size(root)
        check_machine(Config(cpu_size=size), root)

    def test_reserved_pages_are_suggested_whole(self, tmp_path: Path) -> None:
        pages = {
            "sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages": "10240",
            "sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages": "10240",
        }
        root = write(tmp_path, meminfo(64 * GIB, 8 * GIB) | pages)
        assert doctor.suggested_size(root) == 20 * GIB
        assert [found.verdict for found in doctor.examine_huge_pages(root)] == ["ok", "ok"]


class TestHugePages:
    @pytest.mark.parametrize(
        ("mode", "chosen", "verdict"),
        [
            ("always within_size advise [never] deny force", "never", "warn"),
            ("always within_size [advise] never deny force", "advise", "warn"),
            ("always [within_size] advise never deny force", "within_size", "ok"),
            ("[always] within_size advise never deny force", "always", "ok"),
        ],
    )
    def test_mode_of_shared_memory(
        self, mode: str, chosen: str, verdict: Verdict, tmp_path: Path
    ) -> None:
        files = {"sys/kernel/mm/transparent_hugepage/shmem_enabled": mode}
        root = write(tmp_path, meminfo(64 * GIB, 32 * GIB) | files)
        _, found = doctor.examine_huge_pages(root)
        assert (found.value, found.verdict) == (f"shared memory: {chosen}", verdict)

    def test_kernel_that_collapses_pages_needs_no_setting(self, tmp_path: Path) -> None:
        mode = "always within_size advise [never] deny force"
        files = {
            "sys/kernel/mm/transparent_hugepage/shmem_enabled": mode,
            "proc/sys/kernel/osrelease": "6.1.0-generic",
        }
        root = write(tmp_path, meminfo(64 * GIB, 32 * GIB) | files)
        _, found = doctor.examine_huge_pages(root)
        assert (found.value, found.verdict) == ("shared memory: never", "ok")

    def test_advice_reserves_what_is_missing_beside_what_is_in_use(self, tmp_path: Path) -> None:
        pages = {
            "sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages": "100",
            "sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages": "10",
        }
        root = write(tmp_path, meminfo(64 * GIB, 32 * GIB) | pages)
        found, transparent = doctor.examine_huge_pages(root)
        assert (found.value, found.verdict) == ("10 of 100 free", "warn")
        assert f"vm.nr_hugepages={90 + 16 * 512}" in found.advice
        assert transparent.value == "shared memory: not there"


class TestKernel:
    @pytest.mark.parametrize(
        ("release", "verdict"),
        [("6.8.0-45-generic", "ok"), ("5.10.0", "warn"), ("3.10.0-1160.el7", "bad")],
    )
    def test_release_decides(self, release: str, verdict: Verdict, tmp_path: Path) -> None:
        found = doctor.examine_kernel(write(tmp_path, {"proc/sys/kernel/osrelease": release}))
        assert (found.value, found.verdict) == (release, verdict)

    def test_sealed_memory_is_tried(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert doctor.examine_memfd().verdict == "ok"

        def refuse(name: str, flags: int) -> int:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(os, "memfd_create", refuse)
        found = doctor.examine_memfd()
        assert (found.value, found.verdict) == ("Permission denied", "bad")
        assert "seccomp" in found.advice


class TestHost:
    def test_half_a_cpu_is_a_warning(self, tmp_path: Path) -> None:
        files = {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "50000 100000"}
        found = doctor.examine_cpus(write(tmp_path, files))
        assert found.verdict == "warn"
        assert found.value.endswith("cgroup quota 0.5")
        assert doctor.examine_cpus(tmp_path / "nothing").verdict == "ok"

    def test_several_memory_nodes_ask_for_a_daemon_each(self, tmp_path: Path) -> None:
        nodes = tmp_path / "sys/devices/system/node"
        (nodes / "node0").mkdir(parents=True)
        assert doctor.examine_numa(tmp_path).value == "1"
        (nodes / "node1").mkdir()
        found = doctor.examine_numa(tmp_path)
        assert (found.value, found.verdict) == ("2", "warn")
        assert "--membind" in found.advice

    def test_locked_memory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        limits(monkeypatch, 8 << 20)
        assert doctor.examine_memlock().value == "8 MiB"
        limits(monkeypatch, resource.RLIM_INFINITY)
        assert doctor.examine_memlock().value == "unlimited"

    def test_open_files(self, monkeypatch: pytest.MonkeyPatch) -> None:
        limits(monkeypatch, 256)
        found = doctor.examine_open_files()
        assert (found.value, found.verdict) == ("256", "warn")
        assert "ulimit -n" in found.advice
        limits(monkeypatch, 4096)
        assert doctor.examine_open_files().verdict == "ok"
        limits(monkeypatch, resource.RLIM_INFINITY)
        assert doctor.examine_open_files().value == "unlimited"

    def test_shared_memory_folder_is_not_needed(self) -> None:
        assert doctor.examine_shm().verdict == "ok"


class NvmlError(Exception):
    """What pynvml raises."""


def fake_nvml(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    def refuse(*_: object) -> None:
        raise NvmlError("NVML Shared Library Not Found")

    functions = {
        "NVMLError": NvmlError,
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlSystemGetDriverVersion": lambda: "570.1",
        "nvmlDeviceGetCount": lambda: 2,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetMemoryInfo": lambda _: SimpleNamespace(total=80 * GIB),
        "nvmlDeviceGetName": lambda _: b"NVIDIA H100",
    }
    functions |= {name: refuse if value is refuse_it else value for name, value in changes.items()}
    monkeypatch.setitem(sys.modules, "pynvml", SimpleNamespace(**functions))  # type: ignore[arg-type]


refuse_it = object()


class TestGpu:
    def test_each_gpu_is_a_finding(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fake_nvml(monkeypatch)
        found = list(devices.examine_gpus())
        assert [one.name for one in found] == ["gpu 0", "gpu 1"]
        assert {one.value for one in found} == {"NVIDIA H100, 80 GiB"}
        assert "driver 570.1" in found[0].advice

    def test_no_driver_is_no_gpu_and_no_fault(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fake_nvml(monkeypatch, nvmlInit=refuse_it)
        (found,) = devices.examine_gpus()
        assert found.value == "no GPU (NVML Shared Library Not Found)"
        assert found.verdict == "ok"

    def test_driver_that_does_not_answer_is_a_warning(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fake_nvml(monkeypatch, nvmlDeviceGetCount=refuse_it)
        assert [one.verdict for one in devices.examine_gpus()] == ["warn"]

    def test_missing_package_says_that_nobody_looked(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "pynvml", None)
        (found,) = devices.examine_gpus()
        assert (found.value, found.verdict) == ("unknown", "warn")


class TestRdma:
    def test_no_device_means_tcp(self, tmp_path: Path) -> None:
        assert devices.examine_rdma(tmp_path).value == "no device"

    def test_ports_and_their_state(self, tmp_path: Path) -> None:
        port = "sys/class/infiniband/mlx5_0/ports/1"
        files = {f"{port}/state": "1: DOWN", f"{port}/link_layer": "InfiniBand"}
        found = devices.examine_rdma(write(tmp_path, files))
        assert (found.value, found.verdict) == ("mlx5_0:1 InfiniBand down", "warn")
        found = devices.examine_rdma(write(tmp_path, {f"{port}/state": "4: ACTIVE"}))
        assert (found.value, found.verdict) == ("mlx5_0:1 InfiniBand active", "ok")


class TestDisk:
    @pytest.mark.parametrize(
        ("name", "rotational", "kind", "verdict"),
        [
            ("nvme0n1", "0", "NVMe", "ok"),
            ("sda", "0", "solid state", "ok"),
            ("sda", "1", "a disk that turns", "warn"),
            ("vda", "1", "virtual disk", "ok"),
        ],
    )
    @pytest.mark.parametrize("is_partition", [False, True])
    def test_kind_of_disk(
        self,
        name: str,
        rotational: str,
        kind: str,
        verdict: Verdict,
        is_partition: bool,
        tmp_path: Path,
    ) -> None:
        device = tmp_path.stat().st_dev
        files = {f"sys/devices/{name}/queue/rotational": rotational}
        files[f"sys/devices/{name}/{name}p1/partition"] = "1"
        root = write(tmp_path, files)
        link = root / f"sys/dev/block/{os.major(device)}:{os.minor(device)}"
        link.parent.mkdir(parents=True)
        disk = root / "sys/devices" / name
        link.symlink_to(disk / f"{name}p1" if is_partition else disk)
        found, direct = devices.examine_disk(tmp_path / "not/there/yet", root)
        assert found.value.endswith(f"free at {tmp_path}, {kind}")
        assert found.verdict == verdict
        assert direct.name == "direct I/O"

    def test_direct_writes_are_tried_and_leave_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        _, direct = devices.examine_disk(tmp_path, tmp_path)
        assert direct.value in ("works", "Invalid argument")

        opened = os.open

        def refuse(path: str, flags: int, *mode: int, **options: Any) -> int:
            if flags & os.O_DIRECT:
                raise OSError(22, "Invalid argument")
            return opened(path, flags, *mode, **options)

        monkeypatch.setattr(os, "open", refuse)
        _, direct = devices.examine_disk(tmp_path, tmp_path)
        assert (direct.value, direct.verdict) == ("Invalid argument", "warn")
        monkeypatch.undo()
        assert list(tmp_path.iterdir()) == []

    def test_folder_that_nobody_may_write_is_a_warning(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(**_: object) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(devices.tempfile, "TemporaryDirectory", refuse)
        _, direct = devices.examine_disk(tmp_path, tmp_path)
        assert (direct.value, direct.verdict) == ("Permission denied", "warn")

    def test_default_place_depends_on_the_user(self) -> None:
        assert devices.default_disk(0) == Path("/var/lib/kvd")
        assert devices.default_disk(7) == Path.home() / ".cache/kvd"


class TestDaemon:
    def test_daemon_is_found_with_its_pid(self, tmp_path: Path) -> None:
        path = tmp_path / "kvd.sock"
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(str(path))
            listener.listen()
            found = devices.examine_daemon(path)
        assert found.value == f"pid {os.getpid()} of user {os.geteuid()} at {path}"
        assert found.verdict == "ok"
        gone = devices.examine_daemon(path)
        assert (gone.verdict, gone.value) == ("warn", f"gone, its socket is still at {path}")

    def test_no_daemon_is_no_fault(self, tmp_path: Path) -> None:
        found = devices.examine_daemon(tmp_path / "kvd.sock")
        assert found.verdict == "ok"
        assert "`kvd start`" in found.advice
        (tmp_path / "file").write_text("")
        assert devices.examine_daemon(tmp_path / "file/kvd.sock").verdict == "ok"

    def test_something_else_at_the_path_is_a_warning(self, tmp_path: Path) -> None:
        path = tmp_path / "kvd.sock"
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(str(path))
            listener.listen()
            found = devices.examine_daemon(path)
        assert found.verdict == "warn"
        assert "something else is there" in found.advice
        assert devices.examine_daemon(Path("/tmp/" + "x" * 200)).verdict == "warn"

    def test_daemon_of_others_says_what_to_ask_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Closed(socket.socket):
            def connect(self, address: object, /) -> None:
                raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(socket, "socket", Closed)
        found = devices.examine_daemon(Path("/run/kvd/kvd.sock"))
        assert found.verdict == "warn"
        assert "--socket-group" in found.advice


def test_examination_of_this_machine_is_complete(tmp_path: Path) -> None:
    found = doctor.examine(attach=tmp_path / "kvd.sock", disk=tmp_path)
    names = [one.name for one in found]
    assert len(set(names)) == len(names)
    assert {"memory", "huge pages", "kernel", "sealed memory", "rdma", "disk", "daemon"} <= set(
        names
    )
    assert all(one.value and one.advice for one in found)


def test_examination_of_a_machine_that_says_nothing_does_not_fail(tmp_path: Path) -> None:
    assert doctor.examine(tmp_path, attach=tmp_path / "kvd.sock", disk=tmp_path)


def test_worst_verdict_is_the_whole() -> None:
    def of(*verdicts: Verdict) -> Verdict:
        return doctor.worst(
            [Finding(name="x", value="x", verdict=verdict, advice="x") for verdict in verdicts]
        )

    assert of() == "ok"
    assert of("ok", "warn") == "warn"
    assert of("warn", "bad", "ok") == "bad"
