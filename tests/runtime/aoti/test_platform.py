"""Code for other machines is refused before it is opened, with what it needs and what is here."""

from dataclasses import replace

import pytest

from vlmbuild.errors import IncompatibleError
from vlmbuild.runtime.aoti import platform as code_platform
from vlmbuild.runtime.aoti.platform import CodePlatform, check_platform, cpu_features, plain_feature, this_platform

HERE = this_platform()


def test_code_compiled_here_runs_here():
    check_platform(HERE, "artifact")


def test_record_holds_all():
    assert CodePlatform.from_record(HERE.record()) == HERE


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"machine": "riscv64"}, "for processors of type riscv64"),
        ({"features": ("avx2048",)}, "for processors with avx2048, which this one lacks"),
        ({"features": ()}, "for a processor whose features are not known"),
        ({"level": "x86-64-v9"}, "for the level 'x86-64-v9', which is not known"),
        ({"torch": "2.1.0"}, "for torch 2.1.0, and"),
        ({"libc": "glibc 99.1"}, "for glibc 99.1 or newer"),
        ({"libc": "musl 1.2"}, "for musl 1.2 or newer"),
    ],
)
def test_code_for_another_machine_is_refused(other, message):
    with pytest.raises(IncompatibleError, match=f"^artifact: its code was compiled .*{message}"):
        check_platform(replace(HERE, **other), "artifact")


def test_the_level_counts_whatever_the_features_say(monkeypatch):
    needed = replace(HERE, level="x86-64-v4", features=("fma",))
    monkeypatch.setattr(code_platform, "cpu_features", lambda: frozenset(code_platform._level_features("x86-64-v3")))
    with pytest.raises(IncompatibleError, match="avx512bw, .*avx512vl, which this one lacks"):
        check_platform(needed, "artifact")
    check_platform(replace(needed, level="x86-64-v3"), "artifact")


def test_older_c_library_is_no_reason():
    check_platform(replace(HERE, libc="glibc 2.2.5" if HERE.libc.startswith("glibc") else ""), "artifact")


@pytest.mark.parametrize(
    ("lacks", "level"),
    [((), "x86-64-v4"), (("avx512vl",), "x86-64-v3"), (("fma",), "x86-64-v2"), (("ssse3",), "")],
)
def test_level_of_a_processor(monkeypatch, lacks, level):
    everything = {feature for features in code_platform._LEVELS.values() for feature in features}
    monkeypatch.setattr(code_platform, "cpu_features", lambda: frozenset(everything - set(lacks)))
    monkeypatch.setattr(code_platform.platform, "machine", lambda: "x86_64")
    found = this_platform(("amxtile",) if level else ())
    assert found.level == level
    assert "amxtile" in found.features or not level
    assert found.folder == f"cpu-{level or 'x86_64'}"
    assert not set(found.features) & set(lacks)


def test_without_levels_code_is_for_all_that_the_processor_has():
    found = this_platform(levels=False)
    assert found.level == ""
    assert set(found.features) == cpu_features()


def test_features_are_read_from_the_system(monkeypatch, tmp_path):
    file = tmp_path / "cpuinfo"
    file.write_text("processor\t: 0\nflags\t\t: sse4_2 avx512_vnni hypervisor\nprocessor\t: 1\nflags\t\t: other\n")
    monkeypatch.setattr(code_platform, "_CPUINFO", file)
    assert cpu_features() == {"sse42", "avx512vnni"}
    assert plain_feature("-avx512-VNNI") == "avx512vnni"
    monkeypatch.setattr(code_platform, "_CPUINFO", tmp_path / "none")
    assert cpu_features() == frozenset()
