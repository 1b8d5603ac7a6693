"""Behaviour of the device profiles and the byte budget."""

import dataclasses
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.formats import profile as profiles
from edge_dtm.formats.profile import DeviceProfile, list_profiles, load_profile, profiles_dir
from edge_dtm.search.budget import byte_budget, estimate_decode_tokens_per_s

SHIPPED = [
    "android-mid",
    "jetson-orin-nano",
    "laptop-avx2",
    "raspberrypi",
    "raspberrypi4",
    "rk3588",
]
NUMBERS = [
    "ram_bytes",
    "reserve_bytes",
    "effective_bandwidth_bytes_per_s",
    "cores",
    "threads",
    "n_ctx",
    "wanted_tokens_per_s",
    "max_share_of_f16",
]

LINES = {
    "schema_version": "1",
    "name": '"board"',
    "description": '"a board"',
    "ram_bytes": "8_000_000_000",
    "reserve_bytes": "1_000_000_000",
    "effective_bandwidth_bytes_per_s": "10_000_000_000",
    "cores": "4",
    "threads": "4",
    "isa_features": '["neon", "dotprod"]',
    "fast_types": '["Q4_0", "Q8_0"]',
    "n_ctx": "2000",
    "wanted_tokens_per_s": "5.0",
    "max_share_of_f16": "0.5",
    "kv_type": '"F16"',
}


def write_profile(
    folder: Path,
    changes: dict[str, str | None] | None = None,
    source_changes: dict[str, str | None] | None = None,
    sources: bool = True,
) -> str:
    """Write a valid profile with the given lines replaced, added, or removed (None)."""
    lines = {**LINES, **(changes or {})}
    text = "".join(f"{key} = {value}\n" for key, value in lines.items() if value is not None)
    if sources:
        source_lines = dict.fromkeys(NUMBERS, '"data sheet"') | (source_changes or {})
        text += "[sources]\n"
        text += "".join(f"{k} = {v}\n" for k, v in source_lines.items() if v is not None)
    path = folder / "board.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def error_of(path: str) -> str:
    with pytest.raises(EdgeDtmError) as caught:
        load_profile(path)
    message = str(caught.value)
    assert len(message.splitlines()) == 1, "the message has to be one line"
    assert path in message, "the message has to name the file"
    return message


def make_profile(**changes: object) -> DeviceProfile:
    base = DeviceProfile(
        schema_version=1,
        name="board",
        description="a board",
        ram_bytes=8_000_000_000,
        reserve_bytes=1_000_000_000,
        effective_bandwidth_bytes_per_s=10_000_000_000,
        cores=4,
        threads=4,
        isa_features=("neon",),
        fast_types=("Q4_0",),
        n_ctx=2000,
        wanted_tokens_per_s=5.0,
        max_share_of_f16=0.5,
        kv_type="F16",
        sources=dict.fromkeys(NUMBERS, "data sheet"),
    )
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


# Packaged profiles


def test_the_shipped_profiles_are_listed_by_name() -> None:
    assert [profile.name for profile in list_profiles()] == SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_profile_has_a_source_for_everything_and_its_file_name(name: str) -> None:
    profile = load_profile(name)
    assert profile.name == name
    for key in [*NUMBERS, "isa_features", "fast_types", "kv_type"]:
        assert len(profile.sources[key].split()) >= 4, f"{key} needs a sentence as source"


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_profile_has_room_for_a_1b_model_at_4_bits(name: str) -> None:
    # Llama 3.2 1B: 16 layers, 8 KV heads of 64, F16; 1.24e9 weights.
    budget = byte_budget(
        load_profile(name),
        kv_bytes_per_token=2 * 16 * 8 * 64 * 2,
        compute_buffer_bytes=300_000_000,
        f16_file_bytes=2_480_000_000,
        n_ctx=load_profile(name).n_ctx,
    )
    assert budget.bytes > 1_240_000_000 * 4.5 / 8


def test_fast_types_follow_the_instruction_set() -> None:
    for profile in list_profiles():
        if "dotprod" in profile.isa_features:
            expected = {"Q4_0", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "IQ4_NL"}
            assert set(profile.fast_types) == expected
        elif "avx2" in profile.isa_features:
            assert set(profile.fast_types) == {"Q4_0", "Q4_K", "IQ4_NL"}


# Finding and loading


def test_a_profile_loads_from_a_path(tmp_path: Path) -> None:
    profile = load_profile(write_profile(tmp_path))
    assert profile == make_profile(
        isa_features=("neon", "dotprod"),
        fast_types=("Q4_0", "Q8_0"),
    )


def test_a_whole_number_is_fine_where_a_fraction_is_allowed(tmp_path: Path) -> None:
    profile = load_profile(write_profile(tmp_path, {"wanted_tokens_per_s": "5"}))
    assert profile.wanted_tokens_per_s == 5.0
    assert isinstance(profile.wanted_tokens_per_s, float)


def test_a_profile_is_frozen_and_hashable() -> None:
    profile = load_profile("raspberrypi")
    with pytest.raises(dataclasses.FrozenInstanceError):
        profile.cores = 1  # type: ignore[misc]
    assert profile in {profile}


@pytest.mark.parametrize("name", ["raspberry", "Raspberrypi", "", "."])
def test_a_wrong_name_lists_the_available_ones(name: str) -> None:
    with pytest.raises(EdgeDtmError, match=", ".join(SHIPPED)):
        load_profile(name)


def test_what_is_no_file_is_reported(tmp_path: Path) -> None:
    folder = tmp_path / "folder.toml"
    folder.mkdir()
    for path in (folder, tmp_path / "absent.toml"):
        assert "cannot read" in error_of(str(path))


@pytest.mark.parametrize(
    "content",
    [
        b"name = \n",
        b"name = 'a'\nname = 'b'\n",
        b"name = '\xff'\n",
        b"ram_bytes = " + b"9" * 5000 + b"\n",
        b"ram_bytes = 0x" + b"f" * 5000 + b"\n",
        b"a = " + b"[" * 100_000 + b"\n",
    ],
    ids=["syntax", "duplicate key", "not UTF-8", "huge number", "huge hexadecimal", "deep nesting"],
)
def test_broken_toml_is_reported(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.toml"
    path.write_bytes(content)
    assert "not valid TOML" in error_of(str(path))


def test_the_folder_inside_an_installed_package_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "edge_dtm"
    package.mkdir()
    monkeypatch.setattr(profiles, "__file__", str(package / "formats" / "profile.py"))
    with pytest.raises(EdgeDtmError, match="reinstall"):
        profiles_dir()
    (tmp_path / "device_profiles").mkdir()
    assert profiles_dir() == tmp_path.resolve() / "device_profiles"
    (package / "device_profiles").mkdir()
    assert profiles_dir() == package.resolve() / "device_profiles"


# Bad content


@pytest.mark.parametrize("key", [*LINES])
def test_a_missing_key_is_reported(tmp_path: Path, key: str) -> None:
    assert f"{key}: is missing" in error_of(write_profile(tmp_path, {key: None}))


@pytest.mark.parametrize(
    ("changes", "source_changes", "offence"),
    [
        *(
            ({key: value}, {}, f"{key}: ")
            for keys, values in (
                (NUMBERS, ("0", "-1", "true", '"4"', "[4]")),
                (NUMBERS[:-2], ("4.5",)),
                (NUMBERS[-2:], ("inf", "nan", "-inf", "-0.5")),
                (("name", "description"), ("1", '""', '"  "', '"two\\nlines"', '["a"]')),
                (("isa_features", "fast_types"), ('"a"', "[]", '["Q4_0", "Q4_0"]')),
            )
            for key in keys
            for value in values
        ),
        ({"isa_features": '["Q4_0", 4]'}, {}, "isa_features[1]: is 4"),
        ({"isa_features": '[""]'}, {}, "isa_features[0]: is ''"),
        ({"max_share_of_f16": "1.1"}, {}, "max_share_of_f16: is 1.1"),
        ({"fast_types": '["Q4_0", "q4_k"]'}, {}, "fast_types[1]: is 'q4_k', known are BF16, F16"),
        ({"kv_type": '"Q4_K"'}, {}, "kv_type: is 'Q4_K'"),
        ({"threads": "5"}, {}, "threads: is 5, too much for cores 4"),
        ({"reserve_bytes": "8_000_000_000"}, {}, "too much for ram_bytes"),
        *(({}, {key: None}, f"no source for {key}") for key in NUMBERS),
        *(({}, {"cores": value}, "sources.cores: ") for value in ('""', '" "', "1")),
        ({}, {"core": '"x"'}, "sources: 'core' is unknown"),
    ],
)
def test_an_offence_is_named_with_its_place(
    tmp_path: Path,
    changes: dict[str, str | None],
    source_changes: dict[str, str | None],
    offence: str,
) -> None:
    assert offence in error_of(write_profile(tmp_path, changes, source_changes))


def test_sources_have_to_be_a_table(tmp_path: Path) -> None:
    assert "sources: is missing" in error_of(write_profile(tmp_path, sources=False))
    assert "sources: is 'x'" in error_of(write_profile(tmp_path, {"sources": '"x"'}, sources=False))


@pytest.mark.parametrize("version", ["2", "0", '"1"', "1.0", "true"])
def test_another_schema_version_is_the_only_complaint(tmp_path: Path, version: str) -> None:
    message = error_of(write_profile(tmp_path, {"schema_version": version, "new_key": "1"}))
    assert "schema version" in message
    assert "new_key" not in message


def test_all_problems_are_in_one_message(tmp_path: Path) -> None:
    message = error_of(
        write_profile(
            tmp_path,
            {
                "ram_byte": "1",
                "n_ctx": None,
                "cores": "-4",
                "name": "3",
                "fast_types": '["Q9"]',
                "reserve_bytes": "9_000_000_000",
            },
            {"ram_bytes": None},
        )
    )
    for part in [
        "ram_byte: is unknown",
        "n_ctx: is missing",
        "cores: is -4",
        "name: is 3",
        "fast_types[0]: is 'Q9'",
        "reserve_bytes: is 9000000000",
        "no source for ram_bytes",
    ]:
        assert part in message


def test_one_mistake_is_one_complaint(tmp_path: Path) -> None:
    message = error_of(write_profile(tmp_path, {"cores": '"four"'}))
    assert "threads" not in message
    assert message.count(";") == 1, "one problem and one remedy"


# Byte budget


def test_the_three_limits_by_hand() -> None:
    budget = byte_budget(
        make_profile(),
        kv_bytes_per_token=100_000,
        compute_buffer_bytes=300_000_000,
        f16_file_bytes=16_000_000_000,
        n_ctx=2000,
    )
    assert budget.limits == {
        "ram": 8_000_000_000 - 1_000_000_000 - 200_000_000 - 300_000_000,
        "speed": 2_000_000_000 - 100_000_000,
        "share": 8_000_000_000,
    }
    assert (budget.bytes, budget.binding) == (1_900_000_000, "speed")


@pytest.mark.parametrize(
    ("changes", "f16_file_bytes", "binding", "words"),
    [
        ({"ram_bytes": 2_000_000_000}, 16_000_000_000, "ram", "set by memory"),
        ({}, 16_000_000_000, "speed", "set by the wanted speed"),
        ({}, 2_000_000_000, "share", "set by the largest share of the F16 file"),
    ],
)
def test_the_explanation_names_the_binding_limit(
    changes: dict[str, object], f16_file_bytes: int, binding: str, words: str
) -> None:
    budget = byte_budget(
        make_profile(**changes),
        kv_bytes_per_token=100_000,
        compute_buffer_bytes=300_000_000,
        f16_file_bytes=f16_file_bytes,
        n_ctx=2000,
    )
    assert budget.binding == binding and words in budget.explain()


@pytest.mark.parametrize(
    ("arguments", "number", "remedy"),
    [
        ({"compute_buffer_bytes": 7_000_000_000}, "memory leaves -2.0 MB", "more memory"),
        ({"n_ctx": 6_000_000}, "5 tokens/s leave -1,000.0 MB", "lower wanted_tokens_per_s"),
        ({"f16_file_bytes": 1}, "the F16 file leaves 0.0 MB", "check f16_file_bytes"),
    ],
)
def test_no_room_is_an_error_with_numbers_and_remedy(
    arguments: dict[str, float], number: str, remedy: str
) -> None:
    given_arguments: dict[str, float] = {
        "kv_bytes_per_token": 1000,
        "compute_buffer_bytes": 0,
        "f16_file_bytes": 16_000_000_000,
        "n_ctx": 2000,
        **arguments,
    }
    with pytest.raises(EdgeDtmError) as caught:
        byte_budget(make_profile(), **given_arguments)  # type: ignore[arg-type]
    assert number in str(caught.value) and remedy in str(caught.value)


GB = 1_000_000_000
devices = st.builds(
    make_profile,
    ram_bytes=st.integers(2 * GB, 64 * GB),
    reserve_bytes=st.integers(1, 2 * GB - 1),
    effective_bandwidth_bytes_per_s=st.integers(GB, 500 * GB),
    wanted_tokens_per_s=st.floats(0.1, 100.0),
    max_share_of_f16=st.floats(0.01, 1.0),
    n_ctx=st.integers(1, 32_768),
)
models = st.fixed_dictionaries(
    {
        "kv_bytes_per_token": st.integers(0, 300_000),
        "compute_buffer_bytes": st.integers(0, GB),
        "f16_file_bytes": st.integers(1, 200 * GB),
    }
)


def budget_bytes(profile: DeviceProfile, model: dict[str, int], more_tokens: int = 0) -> int:
    """The budget, with 0 for "no room"."""
    try:
        return byte_budget(profile, **model, n_ctx=profile.n_ctx + more_tokens).bytes
    except EdgeDtmError as error:
        assert "no room" in str(error)
        return 0


@given(devices, models)
def test_the_budget_is_the_smallest_limit_and_positive(
    profile: DeviceProfile, model: dict[str, int]
) -> None:
    assume(budget_bytes(profile, model))
    budget = byte_budget(profile, **model, n_ctx=profile.n_ctx)
    assert 0 < budget.bytes == min(budget.limits.values()) == budget.limits[budget.binding]


@given(devices, models)
def test_a_budget_keeps_every_promise(profile: DeviceProfile, model: dict[str, int]) -> None:
    size = budget_bytes(profile, model)
    assume(size)
    kv_full = profile.n_ctx * model["kv_bytes_per_token"]
    used = size + profile.reserve_bytes + kv_full + model["compute_buffer_bytes"]
    assert used <= profile.ram_bytes
    assert size <= profile.max_share_of_f16 * model["f16_file_bytes"] * (1 + 1e-12)
    speed = estimate_decode_tokens_per_s(profile, size, kv_full // 2)
    assert speed >= profile.wanted_tokens_per_s * (1 - 1e-6)


@given(devices, models, st.integers(0, 64 * GB))
def test_more_memory_never_lowers_the_budget(
    profile: DeviceProfile, model: dict[str, int], extra: int
) -> None:
    larger = dataclasses.replace(profile, ram_bytes=profile.ram_bytes + extra)
    assert budget_bytes(larger, model) >= budget_bytes(profile, model)


@given(devices, models, st.integers(0, 500 * GB))
def test_more_bandwidth_never_lowers_the_budget(
    profile: DeviceProfile, model: dict[str, int], extra: int
) -> None:
    faster = dataclasses.replace(
        profile,
        effective_bandwidth_bytes_per_s=profile.effective_bandwidth_bytes_per_s + extra,
    )
    assert budget_bytes(faster, model) >= budget_bytes(profile, model)


@given(devices, models, st.integers(0, 32_768), st.floats(0.0, 100.0))
def test_more_context_or_more_speed_never_raise_the_budget(
    profile: DeviceProfile, model: dict[str, int], more_tokens: int, more_speed: float
) -> None:
    base = budget_bytes(profile, model)
    assert budget_bytes(profile, model, more_tokens) <= base
    wanted = profile.wanted_tokens_per_s + more_speed
    faster = dataclasses.replace(profile, wanted_tokens_per_s=wanted)
    assert budget_bytes(faster, model) <= base


# Speed estimate


def test_the_speed_estimate_is_bandwidth_over_bytes_read() -> None:
    profile = make_profile()
    assert estimate_decode_tokens_per_s(profile, 2 * GB) == 5.0
    assert estimate_decode_tokens_per_s(profile, 2 * GB, kv_bytes_read=2 * GB) == 2.5


def test_the_pi_5_estimate_is_near_the_published_speeds() -> None:
    profile = load_profile("raspberrypi")
    published = {4.58: 2.17, 1.87: 4.88}
    for size_gib, tokens_per_s in published.items():
        estimate = estimate_decode_tokens_per_s(profile, int(size_gib * 2**30))
        assert estimate == pytest.approx(tokens_per_s, rel=0.1)
