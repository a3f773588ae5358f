import msgspec
import pytest

from server.host import HostFacts, parse_cpuinfo, read_host

INTEL = """processor\t: 0
model name\t: Intel(R) Xeon(R) Gold 6254 CPU @ 3.10GHz
flags\t\t: fpu sse sse2 f16c avx2 fma avx512f avx512_vnni
processor\t: 1
model name\t: another
flags\t\t: fpu
"""


def test_known_flags_of_the_first_processor_are_read() -> None:
    cpu, flags = parse_cpuinfo(INTEL)
    assert cpu == "Intel(R) Xeon(R) Gold 6254 CPU @ 3.10GHz"
    assert flags == ("avx2", "fma", "f16c", "avx512f", "avx512_vnni")


def test_arm_spells_its_flags_as_features() -> None:
    assert parse_cpuinfo("processor : 0\nFeatures : fp asimd asimddp\n") == ("", ("asimddp",))


def test_nothing_readable_gives_no_flags() -> None:
    assert parse_cpuinfo("") == ("", ())


@pytest.mark.parametrize(
    ("flags", "expected"),
    [(("avx2",), False), (("avx2", "avx512f"), False), (("avx2", "avx_vnni"), True), (("avx512_vnni",), True)],
)
def test_only_vnni_multiplies_int8_without_saturation(flags: tuple[str, ...], expected: bool) -> None:
    assert HostFacts("cpu", flags, 2).has_int8_dot is expected


def test_fingerprint_follows_what_changes_results_and_speed() -> None:
    host = HostFacts("cpu", ("avx2",), 2, tools={"onnxruntime": "1.32.0", "onnxslim": "0.1.98"})
    same = msgspec.structs.replace(host, tools={"onnxruntime": "1.32.0", "onnxslim": "0.1.99"})
    assert same.fingerprint == host.fingerprint
    changes = [
        {"cpu": "other"},
        {"flags": ("avx2", "avx512_vnni")},
        {"cores": 4},
        {"gpus": ("NVIDIA L4",)},
        {"tools": {"onnxruntime": "1.31.1"}},
        {"arch": "aarch64"},
    ]
    prints = {msgspec.structs.replace(host, **change).fingerprint for change in changes}
    assert len(prints | {host.fingerprint}) == 1 + len(changes)


def test_this_host_can_be_read_twice_with_the_same_result() -> None:
    host = read_host()
    assert host.cores >= 1
    assert host.tools["onnxruntime"]
    assert host.fingerprint == read_host().fingerprint
