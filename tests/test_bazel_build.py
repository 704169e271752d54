"""cc/BUILD against cc/CMakeLists.txt: Bazel itself is not run here, so this keeps it from falling
behind: the same sources, the same flags for each instruction set, and every header listed.
"""

import pathlib
import re

CC = pathlib.Path(__file__).parents[1] / "cc"


def bazel_libraries():
    """The `cc_library` rules of cc/BUILD by name; a BUILD file reads as Python."""
    libraries = {}

    def select(choices):
        (chosen,) = (value for key, value in choices.items() if "x86_64" in key)
        return chosen

    def glob(patterns):
        return [str(path.relative_to(CC)) for pattern in patterns for path in CC.glob(pattern)]

    names = {
        "package": lambda **_: None,
        "licenses": lambda _: None,
        "glob": glob,
        "select": select,
        "cc_library": lambda name, **rule: libraries.update({name: rule}),
    }
    exec((CC / "BUILD").read_text(), names)
    return libraries


def cmake_instruction_sets():
    """What CMake compiles the kernels with, by instruction set."""
    text = (CC / "CMakeLists.txt").read_text()
    common = re.search(r"mdcn_cpu_\$\{name\} PRIVATE (-O3.*?)\$\{ARGN\}", text, re.S).group(1)
    calls = re.findall(r"^ *add_instruction_set\((\w+)([^)]*)\)", text, re.M)
    return {name: [*common.split(), *flags.split()] for name, flags in calls}


def test_same_flags_for_each_instruction_set():
    libraries = bazel_libraries()
    expected = cmake_instruction_sets()
    assert set(expected) == {"baseline", "avx2", "avx512", "avx512bf16"}
    for name, flags in expected.items():
        rule = libraries[f"kernels_{name}"]
        assert rule["copts"] == flags
        assert rule["local_defines"] == [f"MDCN_ISA={name}"]
    # What says that the last one is compiled in.
    assert libraries["core"]["local_defines"] == ["MDCN_AVX512BF16"]
    assert "(mdcn_core PRIVATE MDCN_AVX512BF16)" in (CC / "CMakeLists.txt").read_text()


def test_same_sources():
    text = (CC / "CMakeLists.txt").read_text()
    wanted = re.search(r"add_library\(mdcn_core STATIC ([^)]*)\)", text).group(1).split()
    wanted += re.search(r"add_library\(tf_mdcn_ops SHARED ([^)]*)\)", text).group(1).split()
    wanted += ["core/cpu/kernels.cc"]
    listed = {source for rule in bazel_libraries().values() for source in rule.get("srcs", [])}
    assert {source for source in listed if source.endswith(".cc")} == set(wanted)


def test_every_header_that_is_included_is_listed():
    libraries = bazel_libraries()
    listed = set(libraries["headers"]["hdrs"]) | set(libraries["tf_mdcn_ops"]["srcs"])
    sources = {source for rule in libraries.values() for source in rule.get("srcs", [])}
    included = {
        header
        for source in sources | listed
        for header in re.findall(r'#include "((?:core|tf)/[^"]*)"', (CC / source).read_text())
    }
    assert included and included <= listed


def test_ops_are_linked_whole():
    libraries = bazel_libraries()
    assert libraries["tf_mdcn_ops"]["alwayslink"] == 1
    for rule in libraries.values():
        for dependency in rule.get("deps", []):
            assert dependency.startswith("@") or dependency[1:] in libraries
