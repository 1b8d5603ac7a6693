"""Measuring this machine, and the profile that is written of it."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from fixtures.boards import NATIVE, PI5, UNKNOWN, put
from hypothesis import given
from hypothesis import strategies as st

from edge_dtm.cli import main
from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.core.machine import Room
from edge_dtm.device import bandwidth
from edge_dtm.device import detect as module
from edge_dtm.device.bandwidth import Bandwidth, Rate, write_model
from edge_dtm.device.cpu import Build, Cpu, parse_system_info
from edge_dtm.device.detect import (
    MachineFacts,
    check_name,
    default_name,
    detect,
    profile_of,
    to_toml,
)
from edge_dtm.formats.profile import DeviceProfile, load_profile
from edge_dtm.llamacpp.llama import runtime_info

MEASURED = Bandwidth(
    threads=3,
    by_type={"Q4_0": Rate(3, (9e9, 9.5e9, 8e9)), "Q8_0": Rate(3, (10e9, 10e9, 11e9))},
    sweep=(Rate(1, (4e9,)), Rate(2, (7e9,)), Rate(3, (9e9, 9.5e9, 8e9)), Rate(4, (9.1e9,))),
    model_bytes=256_000_000,
)


FACTS = MachineFacts(
    board="Raspberry Pi 5 Model B Rev 1.0",
    cpu=PI5,
    build=NATIVE,
    ram_bytes=8_000_000_000,
    room=Room(7_000_000_000, "free memory"),
    cores=4,
)


def pi_profile(name: str = "pi", **changes: Any) -> DeviceProfile:
    return profile_of(name, dataclasses.replace(FACTS, **changes), MEASURED, "2026-03-01")


# --- the profile -------------------------------------------------------------------------------


def test_the_profile_says_what_was_measured(tmp_path: Path) -> None:
    profile = pi_profile()
    assert profile.effective_bandwidth_bytes_per_s == 9_000_000_000  # the slower median
    assert (profile.cores, profile.threads) == (4, 3)
    assert profile.reserve_bytes == 1_000_000_000
    packaged = load_profile("raspberrypi")
    assert set(profile.isa_features) == set(packaged.isa_features)
    assert set(profile.fast_types) == set(packaged.fast_types)
    assert (profile.n_ctx, profile.kv_type) == (packaged.n_ctx, packaged.kv_type)
    source = profile.sources["effective_bandwidth_bytes_per_s"]
    for words in ("2026-03-01", "Q4_0 9.00e9 (median of 3, 8.00 to 9.50)", "256 MB"):
        assert words in source
    assert "1: 4.00e9, 2: 7.00e9" in profile.sources["threads"]
    assert "3 %" in profile.sources["threads"]


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_is_a_toml_string(text: str) -> None:
    profile = pi_profile(board=f"Odd {text}".splitlines()[0])
    assert tomllib.loads(to_toml(profile))["description"] == profile.description


def test_a_machine_without_repacking_known_features_or_taken_memory() -> None:
    room = Room(9_000_000_000, "free memory")
    profile = pi_profile(cpu=UNKNOWN, build=Build(frozenset()), board="", room=room)
    assert profile.isa_features == ("riscv64",) and set(profile.fast_types) == {"Q4_0", "Q8_0"}
    assert "repacks no type" in profile.sources["fast_types"]
    assert profile.reserve_bytes == 1  # a profile wants more than 0


@pytest.mark.parametrize("name", ["", "a b", "a/b", "-o", ".x", "ä", "a" * 101, 'a"', "a\nb"])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(EdgeDtmError, match="no name for a profile"):
        check_name(name)


def test_default_names_pass() -> None:
    assert default_name("Raspberry Pi 5 Model B Rev 1.0", PI5) == "raspberry-pi-5-model-b-rev-1.0"
    assert default_name("", Cpu("x", "Intel(R) Core(TM) i7", frozenset(), frozenset())) == (
        "intel-r-core-tm-i7"
    )
    assert default_name("", Cpu("x", "---", frozenset(), frozenset())) == "device"


@given(st.text(max_size=60))
def test_any_board_gives_a_name(text: str) -> None:
    assert check_name(default_name(text, PI5))


# --- what is measured --------------------------------------------------------------------------


def test_a_system_without_proc(tmp_path: Path) -> None:
    with pytest.raises(EdgeDtmError, match="by hand"):
        detect("x", tmp_path)


def test_nothing_is_measured_with_a_build_that_crashes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash() -> Build:
        raise EdgeDtmError("llama.cpp died of SIGILL")

    put(tmp_path, "proc/meminfo", "MemTotal: 8000000 kB\nMemAvailable: 7000000 kB")
    monkeypatch.setattr(module, "first_decode_in_child", crash)
    monkeypatch.setattr(module, "measure", lambda *_: pytest.fail("measured"))
    with pytest.raises(EdgeDtmError, match="SIGILL"):
        detect("x", tmp_path)


# --- the command -------------------------------------------------------------------------------


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["profiles", "detect", *map(str, arguments)])


@pytest.mark.slow
def test_detect_on_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    info = runtime_info()
    build = parse_system_info(info["system_info"], info["llama_cpp_python"])
    real = write_model
    small = dataclasses.replace(bandwidth.TINY_LLAMA, hidden=256, ffn=512)
    monkeypatch.setattr(module, "first_decode_in_child", lambda: build)
    monkeypatch.setattr(
        bandwidth, "write_model", lambda path, kind, size: real(path, kind, 1, small)
    )
    result = run("-o", tmp_path / "me.toml", "--name", "me")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"{tmp_path / 'me.toml'}: ")
    profile = load_profile(str(tmp_path / "me.toml"))
    assert profile.name == "me"
    (total,) = re.findall(r"MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text())
    assert profile.ram_bytes == int(total) * 1024
    shown = CliRunner().invoke(main, ["profiles", "show", str(tmp_path / "me.toml")])
    assert shown.exit_code == 0 and profile.sources["threads"] in shown.stdout


def test_the_file_is_looked_at_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(module, "detect", lambda *_: pytest.fail("measured"))
    (tmp_path / "p.toml").write_text("mine")
    for arguments, words in (
        (["-o", str(tmp_path / "p.toml")], "exists already"),
        (["-o", str(tmp_path / "p")], "end in .toml"),
        (["-o", str(tmp_path / "none" / "p.toml")], "folder that exists"),
        (["--name", "a b"], "no name for a profile"),
    ):
        result = run(*arguments)
        assert result.exit_code == 1 and words in result.stderr
        assert len(result.stderr.splitlines()) == 1


def test_the_name_is_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "detect", lambda name, *_: pi_profile(name=name))
    assert run("--name", "pi").exit_code == 0
    profile = load_profile("./pi.toml")
    assert profile == pi_profile(name="pi") and profile.sources == pi_profile(name="pi").sources
