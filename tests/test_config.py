"""A config comes from flags, variables and TOML alike, and whatever is wrong stops the start."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvd.daemon.config import Config, flag_of, load_config, settings, variable_of
from kvd.daemon.preflight import check_machine
from kvd.errors import ConfigError
from kvd.proto.address import default_socket, is_loopback, parse_address
from kvd.sizes import format_share, format_size, parse_size

GIB = 1 << 30

# One value for each field that is not its default: what people write, and what it means.
SAMPLES: dict[str, tuple[str, object]] = {
    "tiers": ("cpu,nvme", ("cpu", "nvme")),
    "cpu_size": ("1.5GiB", 3 << 29),
    "cpu_packed_size": ("1GiB", 1 << 30),
    "huge_pages": ("require", "require"),
    "cpu_persist": ("true", True),
    "cpu_persist_s": ("2.5", 2.5),
    "nvme_path": ("/var/lib/kvd", "/var/lib/kvd"),
    "nvme_size": ("200GiB", 200 << 30),
    "nvme_reserve": ("10GiB", 10 << 30),
    "nvme_write": ("through", "through"),
    "nvme_admit_hits": ("2", 2),
    "nvme_quota": ("1GiB", 1 << 30),
    "nvme_prefetch": ("false", False),
    "nvme_scrub_rate": ("1MiB", 1 << 20),
    "nvme_flush_s": ("2.5", 2.5),
    "nvme_key_file": ("/key", "/key"),
    "nvme_key_command": ("cat /key", "cat /key"),
    "codec": ("cpu=bf16", "cpu=bf16"),
    "codec_threads": ("3", 3),
    "profiles": ("/profiles", "/profiles"),
    "socket": ("/tmp/a.sock", Path("/tmp/a.sock")),
    "socket_group": ("engines", "engines"),
    "grpc_socket": ("none", "none"),
    "listen": ("127.0.0.1:9471", "127.0.0.1:9471"),
    "tls_cert": ("/c.pem", "/c.pem"),
    "tls_key": ("/k.pem", "/k.pem"),
    "tls_client_ca": ("/ca.pem", "/ca.pem"),
    "insecure": ("true", True),
    "http": ("none", "none"),
    "drain_s": ("2.5", 2.5),
    "eviction": ("other", "other"),
    "log_level": ("debug", "debug"),
    "log_file": ("/tmp/kvd.log", "/tmp/kvd.log"),
}

# What a field cannot be without.
COMPANIONS = {
    "tls_cert": "tls_key",
    "tls_key": "tls_cert",
    "tls_client_ca": "tls_cert",
    "cpu_packed_size": "codec",
    "tiers": "nvme_path",
    "nvme_path": "tiers",
}


def with_companions(name: str) -> list[str]:
    """`name`, and the fields without which it is refused."""
    names = [name]
    while names[-1] in COMPANIONS and COMPANIONS[names[-1]] not in names:
        names.append(COMPANIONS[names[-1]])
    return names


def write_toml(folder: Path, text: str) -> Path:
    path = folder / "kvd.toml"
    path.write_text(text)
    return path


def make_machine(
    root: Path,
    *,
    total: int = 16 * GIB,
    v2_limits: dict[str, str] | None = None,
    v1_limits: dict[str, str] | None = None,
    num_huge_free: int = 0,
) -> Path:
    """A root with /proc and /sys of a machine; limits by cgroup path."""
    (root / "proc/self").mkdir(parents=True)
    text = f"MemTotal: {total // 1024} kB\nMemAvailable: {total // 2048} kB\n"
    (root / "proc/meminfo").write_text(text)
    (root / "proc/self/cgroup").write_text("4:cpu,memory:/a/b\n0::/a/b\n")
    bases = (("sys/fs/cgroup", "memory.max", v2_limits),)
    bases += (("sys/fs/cgroup/memory", "memory.limit_in_bytes", v1_limits),)
    for base, name, limits in bases:
        for path, limit in (limits or {}).items():
            directory = root / base / path
            directory.mkdir(parents=True, exist_ok=True)
            (directory / name).write_text(f"{limit}\n")
    pages = root / "sys/kernel/mm/hugepages/hugepages-2048kB"
    pages.mkdir(parents=True)
    (pages / "free_hugepages").write_text(f"{num_huge_free}\n")
    (pages / "nr_hugepages").write_text(f"{num_huge_free}\n")
    return root


class TestSize:
    @pytest.mark.parametrize(
        ("text", "size"),
        [
            ("4096", 4096),
            ("1B", 1),
            ("8GiB", 8 * GIB),
            ("8Gi", 8 * GIB),
            ("512MiB", 512 << 20),
            ("1.5GiB", 3 << 29),
            (" 1.5 gib ", 3 << 29),
            ("2GB", 2 * 10**9),
            ("1.1 TB", 11 * 10**11),
            ("0.0001KiB", 0),
        ],
    )
    def test_size_means_what_people_write(self, text: str, size: int) -> None:
        assert parse_size(text) == size

    @pytest.mark.parametrize(
        "text",
        ["", "8G", "8 M", "GiB", "-1GiB", "1.5", "1.5B", "1e9", "8GiBs", "٣GiB", "9" * 31, "1_0"],
    )
    def test_anything_else_is_refused_with_an_example(self, text: str) -> None:
        with pytest.raises(ValueError, match=r"a size like 8GiB, .* wanted, found"):
            parse_size(text)

    @given(st.integers(0, 1 << 62), st.sampled_from(["", "B", "KiB", "MiB", "GiB", "KB", "MB"]))
    def test_whole_sizes_come_back(self, count: int, unit: str) -> None:
        factor = parse_size(f"1{unit}")
        assert parse_size(f"{count}{unit}") == count * factor

    @given(st.integers(0, 1 << 62))
    def test_formatted_size_reads_back_within_its_rounding(self, size: int) -> None:
        assert abs(parse_size(format_size(size)) - size) <= size * 0.005 + 1

    @given(st.integers(1, 1023), st.sampled_from(["B", "KiB", "MiB", "GiB", "TiB"]))
    def test_round_sizes_keep_their_unit(self, count: int, unit: str) -> None:
        assert format_size(parse_size(f"{count}{unit}")) == f"{count} {unit}"

    def test_format_never_says_1024_of_a_unit(self) -> None:
        assert format_size((1 << 20) - 1) == "1 MiB"

    def test_share_of_nothing_is_nothing(self) -> None:
        assert format_share(GIB, 4 * GIB) == "1 GiB of 4 GiB (25 %)"
        assert format_share(0, 0) == "0 B of 0 B (0 %)"


class TestAddress:
    def test_default_socket_is_the_same_for_daemon_and_client(self) -> None:
        runtime = {"XDG_RUNTIME_DIR": "/run/user/7"}
        assert default_socket({}, 0) == Path("/run/kvd/kvd.sock")
        assert default_socket(runtime, 0) == Path("/run/kvd/kvd.sock")
        assert default_socket(runtime, 7) == Path("/run/user/7/kvd/kvd.sock")
        assert default_socket({}, 7) == Path("/tmp/kvd-7/kvd.sock")
        assert default_socket({**runtime, "KVD_SOCKET": "/x"}, 7) == Path("/x")

    def test_address_is_host_and_port(self) -> None:
        assert parse_address("127.0.0.1:80") == ("127.0.0.1", 80)
        assert parse_address("[::1]:0") == ("::1", 0)
        assert parse_address("node-7.cluster:65535") == ("node-7.cluster", 65535)

    @pytest.mark.parametrize(
        "text", ["", "80", ":80", "host:", "::1:80", "a b:80", "a/b:80", "u@h:1"]
    )
    def test_address_without_host_and_port_is_refused(self, text: str) -> None:
        with pytest.raises(ValueError, match="wanted, found"):
            parse_address(text)

    @pytest.mark.parametrize("port", ["65536", "-1", "x", "٣", "99999999"])
    def test_port_out_of_range_is_refused(self, port: str) -> None:
        with pytest.raises(ValueError, match=r"a port in 0\.\.65535 wanted, found"):
            parse_address(f"host:{port}")

    def test_only_this_machine_is_loopback(self) -> None:
        assert all(map(is_loopback, ["localhost", "127.0.0.1", "127.9.9.9", "::1"]))
        assert not any(map(is_loopback, ["0.0.0.0", "::", "10.0.0.1", "localhost.evil", "node"]))


class TestSources:
    def test_nothing_given_is_the_defaults(self) -> None:
        config = load_config({}, {}, None)
        assert config == Config(socket=default_socket({}))
        assert config.tiers == ("cpu",)
        assert config.cpu_size == 4 * GIB
        assert config.http == "127.0.0.1:9470"

    def test_every_field_has_a_sample_here(self) -> None:
        assert set(SAMPLES) == {field.name for field in fields(Config)} == set(settings())

    @pytest.mark.parametrize("name", SAMPLES)
    def test_every_field_comes_from_a_flag_a_variable_and_toml(
        self, name: str, tmp_path: Path
    ) -> None:
        names = with_companions(name)
        flags = {key: SAMPLES[key][0] for key in names}
        env = {variable_of(key): SAMPLES[key][0] for key in names}
        toml = write_toml(tmp_path, "".join(f'{key} = "{SAMPLES[key][0]}"\n' for key in names))
        expected = SAMPLES[name][1]
        assert getattr(load_config(flags, {}, None), name) == expected
        assert getattr(load_config({}, env, None), name) == expected
        assert getattr(load_config({}, {}, toml), name) == expected

    def test_toml_may_use_its_own_types(self, tmp_path: Path) -> None:
        text = 'tiers = ["cpu", "gpu"]\ncpu_size = 4194304\ninsecure = true\ndrain_s = 3\n'
        config = load_config({}, {}, write_toml(tmp_path, text))
        assert config.tiers == ("cpu", "gpu")
        assert config.cpu_size == 4 << 20
        assert config.insecure is True
        assert config.drain_s == 3.0

    def test_flags_beat_variables_and_variables_beat_toml(self, tmp_path: Path) -> None:
        toml = write_toml(tmp_path, 'cpu_size = "1GiB"\nhttp = "none"\nlog_level = "debug"\n')
        env = {"KVD_CPU_SIZE": "2GiB", "KVD_HTTP": "127.0.0.1:1"}
        config = load_config({"cpu_size": "3GiB"}, env, toml)
        assert (config.cpu_size, config.http, config.log_level) == (3 * GIB, "127.0.0.1:1", "debug")

    def test_a_switch_can_be_taken_back(self) -> None:
        assert not load_config({"insecure": False}, {"KVD_INSECURE": "1"}, None).insecure

    def test_flag_that_is_none_and_empty_variable_are_not_given(self, tmp_path: Path) -> None:
        toml = write_toml(tmp_path, 'cpu_size = "1GiB"\n')
        config = load_config({"cpu_size": None}, {"KVD_CPU_SIZE": "", "KVD_SOCKET": ""}, toml)
        assert config.cpu_size == GIB
        assert config.socket == default_socket({})

    def test_unknown_toml_key_names_file_key_and_valid_ones(self, tmp_path: Path) -> None:
        toml = write_toml(tmp_path, 'cpu_sise = "1GiB"\n')
        with pytest.raises(ConfigError) as caught:
            load_config({}, {}, toml)
        assert str(caught.value).startswith(
            f"{toml}: key cpu_sise is unknown; did you mean cpu_size?"
        )
        assert "log_file" in str(caught.value)

    def test_toml_table_is_an_unknown_key(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="key zzz is unknown; There is: tiers, cpu_size"):
            load_config({}, {}, write_toml(tmp_path, "[zzz]\ncpu_size = 1\n"))

    def test_unknown_variable_is_refused_even_if_empty(self) -> None:
        with pytest.raises(ConfigError, match=r"variable KVD_CPUSIZE .*did you mean KVD_CPU_SIZE"):
            load_config({}, {"KVD_CPUSIZE": ""}, None)

    def test_unknown_flag_is_refused(self) -> None:
        with pytest.raises(
            ConfigError, match=r"flag --cpu-sise is unknown; did you mean --cpu-size"
        ):
            load_config({"cpu_sise": "1GiB"}, {}, None)

    def test_variables_of_others_are_left_alone(self) -> None:
        env = {
            "KVD_CONFIG": "/etc/kvd.toml",
            "KVD_SERVICE_HOST": "10.0.0.1",
            "KVD_SERVICE_PORT": "9471",
            "KVD_SERVICE_PORT_GRPC": "9471",
            "KVD_PORT": "tcp://10.0.0.1:9471",
            "KVD_PORT_9471_TCP": "tcp://10.0.0.1:9471",
            "KVD_PORT_9471_TCP_ADDR": "10.0.0.1",
            "KVD_METRICS_SERVICE_HOST": "10.0.0.2",
            "_KVD_COMPLETE": "bash_source",
            "HOME": "/root",
        }
        assert load_config({}, env, None) == load_config({}, {}, None)

    def test_missing_file_and_bad_toml_name_the_file(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"config file .*nowhere.toml: No such file"):
            load_config({}, {}, tmp_path / "nowhere.toml")
        with pytest.raises(ConfigError, match=r"config file .*kvd.toml is no TOML: "):
            load_config({}, {}, write_toml(tmp_path, "cpu_size 4"))
        (tmp_path / "kvd.toml").write_bytes(b"\xff\xfe")
        with pytest.raises(ConfigError, match="is no TOML"):
            load_config({}, {}, tmp_path / "kvd.toml")

    def test_a_bad_value_stops_the_start_even_if_overridden(self) -> None:
        with pytest.raises(ConfigError, match="variable KVD_CPU_SIZE: a size like"):
            load_config({"cpu_size": "1GiB"}, {"KVD_CPU_SIZE": "8G"}, None)

    def test_flag_and_variable_are_spelled_from_the_field(self) -> None:
        assert (flag_of("tls_client_ca"), variable_of("drain_s")) == (
            "--tls-client-ca",
            "KVD_DRAIN_S",
        )


class TestValues:
    @pytest.mark.parametrize(
        ("name", "value", "message"),
        [
            ("tiers", "", "flag --tiers: at least one name and none twice wanted, found ''"),
            ("tiers", "cpu,cpu", "at least one name and none twice wanted"),
            ("tiers", 3, "names with commas between them wanted, found 3"),
            ("cpu_size", "1MiB", "flag --cpu-size: at least 2 MiB wanted, found 1 MiB"),
            ("cpu_size", "lots", "a size like 8GiB, 1.5GiB, 512MiB or 2GB wanted, found 'lots'"),
            ("cpu_size", True, "a size like 8GiB wanted, found True"),
            ("cpu_size", -4, "at least 2 MiB wanted, found -4 B"),
            ("huge_pages", "yes", "one of auto, never, require wanted, found 'yes'"),
            ("socket", "", "flag --socket: a path wanted, found ''"),
            ("socket", "/tmp/" + "x" * 120, "a socket's path has at most 107 bytes, found 125"),
            ("grpc_socket", "/tmp/" + "x" * 120, "grpc_socket: a socket's path has at most 107"),
            ("listen", "9471", "flag --listen: an address like 127.0.0.1:9471"),
            ("listen", "127.0.0.1:99999", "a port in 0..65535 wanted, found '99999'"),
            ("http", "", "flag --http: an address like"),
            ("http", 9470, "an address like 127.0.0.1:9471 wanted, found 9470"),
            ("insecure", "maybe", "true or false wanted, found 'maybe'"),
            ("insecure", 1, "true or false wanted, found 1"),
            ("drain_s", "-1", "flag --drain-s: seconds in 0..3600 wanted, found '-1'"),
            ("drain_s", "nan", "seconds in 0..3600 wanted"),
            ("drain_s", "3601", "seconds in 0..3600 wanted"),
            ("drain_s", True, "seconds in 0..3600 wanted, found True"),
            ("log_level", "loud", "one of debug, info, warning, error wanted, found 'loud'"),
            ("log_file", "a\nb", "printable text wanted"),
            ("eviction", 3, "flag --eviction: printable text wanted, found 3"),
        ],
    )
    def test_bad_value_says_what_was_wanted_and_found(
        self, name: str, value: object, message: str
    ) -> None:
        with pytest.raises(ConfigError) as caught:
            load_config({name: value}, {}, None)
        assert message in str(caught.value)

    def test_a_config_made_in_code_is_checked_too(self) -> None:
        with pytest.raises(ConfigError, match="cpu_size: at least 2 MiB wanted, found 4 KiB"):
            Config(cpu_size=4096)
        with pytest.raises(ConfigError, match="cpu_size: '4GiB' is not read yet"):
            Config(cpu_size="4GiB")  # type: ignore[arg-type]

    def test_grpc_socket_lies_beside_the_other_one(self) -> None:
        beside = Config(socket=Path("/run/kvd/kvd.sock"))
        assert beside.grpc_socket_path == Path("/run/kvd/kvd.grpc.sock")
        assert Config(grpc_socket="/x.sock").grpc_socket_path == Path("/x.sock")
        assert Config(grpc_socket="none").grpc_socket_path is None

    def test_both_sockets_at_one_path_are_refused(self) -> None:
        with pytest.raises(ConfigError, match=r"are the same path, /a\.sock"):
            Config(socket=Path("/a.sock"), grpc_socket="/a.sock")


class TestTls:
    def test_listening_beyond_loopback_needs_tls(self) -> None:
        with pytest.raises(ConfigError, match=r"listen 0.0.0.0:1 .*without tls_cert and tls_key"):
            Config(listen="0.0.0.0:1")
        assert Config(listen="node:1", tls_cert="c", tls_key="k").has_tls
        assert Config(listen="0.0.0.0:1", tls_cert="c", tls_key="k", tls_client_ca="a").has_tls

    def test_listening_beyond_loopback_goes_without_tls_if_told_so(self) -> None:
        assert not Config(listen="[::]:1", insecure=True).has_tls

    @pytest.mark.parametrize("address", ["127.0.0.1:1", "[::1]:1", "localhost:1"])
    def test_loopback_needs_no_tls(self, address: str) -> None:
        assert Config(listen=address).listen == address

    def test_half_of_a_pair_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="tls_cert is given without tls_key"):
            Config(tls_cert="c")
        with pytest.raises(ConfigError, match="tls_key is given without tls_cert"):
            Config(tls_key="k")
        with pytest.raises(
            ConfigError, match="tls_client_ca is given without tls_cert and tls_key"
        ):
            Config(tls_client_ca="a")


class TestMachine:
    def test_the_default_starts_on_an_ordinary_machine(self, tmp_path: Path) -> None:
        check_machine(Config(), make_machine(tmp_path))

    def test_tier_that_does_not_exist_lists_those_that_do(self, tmp_path: Path) -> None:
        with pytest.raises(
            ConfigError, match=r"tier 'gpu' does not exist here; there is: cpu, nvme$"
        ):
            check_machine(Config(tiers=("gpu", "cpu")), make_machine(tmp_path))

    def test_a_disk_tier_needs_memory_above_it(self, tmp_path: Path) -> None:
        config = Config(tiers=("nvme",), nvme_path="/var/lib/kvd")
        with pytest.raises(ConfigError, match=r"tier cpu is missing.* found nvme"):
            check_machine(config, make_machine(tmp_path))

    def test_the_nvme_tier_and_its_folder_come_together(self) -> None:
        with pytest.raises(ConfigError, match="tier nvme needs a folder: give nvme_path"):
            Config(tiers=("cpu", "nvme"))
        with pytest.raises(ConfigError, match="nvme is not among the tiers"):
            Config(nvme_path="/var/lib/kvd")

    def test_one_way_to_the_key(self) -> None:
        with pytest.raises(ConfigError, match="both given: choose one"):
            Config(nvme_key_file="/a", nvme_key_command="b")

    @pytest.mark.parametrize("value", ["0", "1001", "x", "1.5", True])
    def test_a_count_out_of_bounds_is_refused(self, value: object) -> None:
        with pytest.raises(ConfigError, match=r"a whole number in 1\.\.1000 wanted"):
            load_config({"nvme_admit_hits": value}, {}, None)

    def test_policy_that_does_not_exist_lists_those_that_do(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"eviction policy 'mru' .*there is: .*lru"):
            check_machine(Config(eviction="mru"), make_machine(tmp_path))

    def test_arena_larger_than_memory_is_refused_with_both_numbers(self, tmp_path: Path) -> None:
        root = make_machine(tmp_path, total=16 * GIB)
        check_machine(Config(cpu_size=16 * GIB), root)
        with pytest.raises(ConfigError, match="cpu_size is 64 GiB, but this machine has 16 GiB of"):
            check_machine(Config(cpu_size=64 * GIB), root)

    @pytest.mark.parametrize("version", ["v1_limits", "v2_limits"])
    @pytest.mark.parametrize("path", ["a/b", "a", "."])
    def test_limit_of_any_cgroup_above_counts(
        self, version: str, path: str, tmp_path: Path
    ) -> None:
        limits = {"a/b": "max", path: str(6 * GIB)}
        root = make_machine(tmp_path, **{version: limits})  # type: ignore[arg-type]
        check_machine(Config(cpu_size=6 * GIB), root)
        with pytest.raises(ConfigError, match="is 8 GiB, but its cgroup allows this process 6 GiB"):
            check_machine(Config(cpu_size=8 * GIB), root)

    @pytest.mark.parametrize("limit", ["max", "9223372036854771712"])
    def test_no_limit_is_no_limit(self, limit: str, tmp_path: Path) -> None:
        root = make_machine(tmp_path, v1_limits={"a/b": limit}, v2_limits={"a/b": limit})
        check_machine(Config(cpu_size=16 * GIB), root)

    def test_limit_is_found_where_the_container_sees_only_its_own_root(
        self, tmp_path: Path
    ) -> None:
        root = make_machine(tmp_path, v2_limits={".": str(GIB)})
        (root / "proc/self/cgroup").write_text("0::/../../kubepods/pod7\n")
        with pytest.raises(ConfigError, match="its cgroup allows this process 1 GiB"):
            check_machine(Config(cpu_size=2 * GIB), root)

    def test_reserved_huge_pages_do_not_count_against_the_cgroup(self, tmp_path: Path) -> None:
        root = make_machine(tmp_path, v2_limits={"a/b": str(GIB)}, num_huge_free=4096)
        check_machine(Config(cpu_size=8 * GIB), root)
        with pytest.raises(ConfigError, match="its cgroup allows"):
            check_machine(Config(cpu_size=8 * GIB, huge_pages="never"), root)

    def test_machine_that_says_nothing_refuses_nothing(self, tmp_path: Path) -> None:
        check_machine(Config(cpu_size=64 * GIB), tmp_path)

    @pytest.mark.parametrize("name", ["tls_cert", "tls_key", "tls_client_ca"])
    def test_file_that_cannot_be_read_is_named(self, name: str, tmp_path: Path) -> None:
        there = tmp_path / "there.pem"
        there.write_text("pem")
        missing = tmp_path / "missing.pem"
        paths = dict.fromkeys(("tls_cert", "tls_key", "tls_client_ca"), str(there))
        check_machine(Config(**paths), make_machine(tmp_path))  # type: ignore[arg-type]
        config = Config(**{**paths, name: str(missing)})  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=f"{name}: {missing}: No such file"):
            check_machine(config, tmp_path)

    def test_log_file_without_a_directory_is_refused(self, tmp_path: Path) -> None:
        config = Config(log_file=str(tmp_path / "no/kvd.log"))
        with pytest.raises(ConfigError, match=r"log_file: .*no/kvd.log has no directory"):
            check_machine(config, make_machine(tmp_path))

    def test_group_that_does_not_exist_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="socket_group: there is no group 'no-such-group'"):
            check_machine(Config(socket_group="no-such-group"), make_machine(tmp_path))
