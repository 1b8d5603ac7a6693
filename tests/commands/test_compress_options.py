"""compress: wrong options and models are refused before the long run; what presets set."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_runner import assert_error, assert_usage, run
from click.testing import Result
from fixtures.tiny_llama import make_tiny_llama

from edge_dtm.formats.profile import load_profile

Compress = Callable[..., Result]


@pytest.fixture(scope="session")
def cli_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    out: Path = make_tiny_llama(
        tmp_path_factory.mktemp("cli") / "hf", steps=0, layers=1, max_shard_size="3MB"
    )
    return out


@pytest.fixture
def folder(cli_folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(cli_folder, tmp_path / "hf"))


@pytest.fixture
def compress(tmp_path: Path) -> Compress:
    """Runs compress with a small prompts file: compress(model, *options)."""
    (tmp_path / "prompts.txt").write_text(
        "one apple\ntwo pears\nthree plums\nfour figs\nfive nuts\n"
    )
    usual = ("--tokens", "4", "--device", "cpu", "--max-bytes", "9M", "-o", tmp_path / "out")

    def compressed(model: Path, *options: str | Path) -> Result:
        return run("compress", model, "--prompts", tmp_path / "prompts.txt", *usual, *options)

    return compressed


def test_models_that_cannot_be_used(
    compress: Compress, folder: Path, tmp_path: Path, tiny_gguf: Path
) -> None:
    assert_error(compress(tmp_path / "none"), "does not exist")
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(tiny_gguf.read_bytes()[:-5000])
    assert_error(compress(cut), "cut.gguf")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["GPT2LMHeadModel"]}))
    assert_error(compress(folder), "GPT2LMHeadModel")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert_error(compress(folder), "model-00002-of-00002.safetensors")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("key", "words"),
    [
        # The first answer shows it.
        ("model.layers.0.mlp.up_proj.weight", "blk.0.ffn_up.weight has 1 NaN"),
        # No answer shows it: it is in the row of a token that is never read.
        ("model.embed_tokens.weight", "token_embd.weight has 1 NaN"),
    ],
)
def test_nan_weights(
    compress: Compress, folder: Path, tmp_path: Path, key: str, words: str
) -> None:
    """All of them are read while the reference is made, which is not kept then."""
    from safetensors.torch import load_file, save_file

    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        if key in tensors:
            tensors[key][-1, 0] = float("nan")
        save_file(tensors, file, metadata={"format": "pt"})
    assert_error(compress(folder), words, progress=True)
    assert not list((tmp_path / "out" / "work").iterdir())


def test_bad_prompts(compress: Compress, cli_folder: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "fine"}\n{broken\n')
    assert_error(compress(cli_folder, "--prompts", bad), "line 2")
    assert_error(compress(cli_folder, "--prompts", tmp_path / "none.txt"), "none.txt")
    assert_error(compress(cli_folder, "--tokens", "600"), "do not fit the context of 512")


def test_what_no_model_meets(compress: Compress, cli_folder: Path) -> None:
    assert_error(compress(cli_folder, "--profile", "nosuch"), "nosuch")
    assert_error(compress(cli_folder, "--max-bytes", "100K"), "smallest plan takes", progress=True)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ("--types Q4_0,Q9_9", "Q9_9"),
        ("--types ,", "--types"),
        ("--sparsity 0.96", "--sparsity"),
        ("--sparsity 0.2 --max-sdt 0.1", "--sparsity"),
        ("--sparsity 0.2 --min-fdt 9", "--sparsity"),
        ("--sparsity-steps 3", "--sparsity-steps needs"),
        ("--sparsity-steps 3 --sparsity 0.5", "--sparsity-steps needs"),
        ("--preset paper-int8 --types Q8_0", "--preset sets the types"),
        ("--preset paper-int8 --max-sdt 0.1", "--preset sets the types"),
        ("--preset paper-sparse --min-fdt 9", "--preset sets the types"),
        ("--preset paper-sparse --int8-share 0.5", "--int8-share"),
        ("--preset paper-int8 --int8-share 1.5", "--int8-share"),
        ("--preset paper-int8 --sparsity 0.5", "--sparsity"),
        ("--int8-share 0.5", "paper-int8"),
    ],
)
def test_options_that_do_not_go_together(tmp_path: Path, options: str, named: str) -> None:
    assert_usage(run("compress", tmp_path, "-o", tmp_path / "out", *options.split()), named)


@pytest.mark.parametrize(
    ("options", "goal", "method"),
    [
        ("", {}, {}),
        (
            "--sparsity 0.9 --sparsity-steps 3 --distill 20 --mask-score saliency --no-in-order",
            {"sparsity": 0.9},
            {"sparsity_steps": 3, "distill_steps": 20, "mask_score": "saliency"}
            | {"sequential_pruning": False},
        ),
        (
            "--preset paper-int8",
            {"types": ("F16", "Q8_0"), "int8_share": 0.8, "unlimited": True},
            {"equalize": False, "feedback": False},
        ),
        (
            "--preset paper-int8 --int8-share 0 --max-bytes 5M",
            {"types": ("F16", "Q8_0"), "int8_share": 0.0, "max_bytes": 5_000_000},
            {"equalize": False, "feedback": False},
        ),
        (
            "--preset paper-sparse",
            {"types": ("F16",), "sparsity": 0.75, "unlimited": True},
            {"sparsity_steps": 4, "distill_steps": 500},
        ),
        (
            "--preset paper-sparse --sparsity 0.6 --distill 7 --sparsity-steps 2",
            {"types": ("F16",), "sparsity": 0.6, "unlimited": True},
            {"sparsity_steps": 2, "distill_steps": 7},
        ),
    ],
)
def test_settings(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    options: str,
    goal: dict[str, Any],
    method: dict[str, Any],
) -> None:
    pytest.importorskip("torch")
    from edge_dtm.host.settings import Goal, Method

    asked: list[Any] = []
    monkeypatch.setattr("edge_dtm.host.compress.compress", lambda s, _: asked.append(s))
    result = run("compress", tmp_path, "-o", tmp_path / "out", *options.split())
    assert result.exit_code == 0, (result.output, result.exception)
    assert asked[0].goal == Goal(load_profile("raspberrypi"), **goal)
    assert asked[0].method == Method(**method)


def test_imatrix_files_that_do_not_fit(
    compress: Compress, cli_folder: Path, tmp_path: Path
) -> None:
    """Known before anything is made or measured."""
    import numpy as np

    from edge_dtm.formats.imatrix import write_imatrix
    from edge_dtm.host.checkpoint.open import open_checkpoint

    components = open_checkpoint(cli_folder).components()
    right = {c.name: np.ones(c.row_length, np.float32) for c in components}
    wrong = right | {"blk.0.ffn_down": np.ones(256, np.float32)}
    few = {n: v for n, v in right.items() if n != "blk.0.attn_q"}
    path = tmp_path / "i.gguf"
    for vectors, word in ((wrong, "blk.0.ffn_down (256 values, not 512)"), (few, "blk.0.attn_q")):
        write_imatrix(path, vectors, 512, ["a"])
        assert_error(compress(cli_folder, "--imatrix", path), "does not fit this model", word)
    path.write_bytes(path.read_bytes()[:200])
    assert_error(compress(cli_folder, "--imatrix", path), "no whole imatrix file")
    assert_error(compress(cli_folder, "--imatrix", tmp_path / "none"), "none does not exist")
    assert not (tmp_path / "out").exists()


def test_cuda_without_a_gpu(compress: Compress, cli_folder: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert_error(compress(cli_folder, "--device", "cuda"), "torch sees no GPU")


def test_foreign_files_are_left_alone(compress: Compress, cli_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    assert_error(compress(cli_folder, "-o", out), "thesis.txt")
    assert [p.name for p in out.iterdir()] == ["thesis.txt"]
    assert (out / "thesis.txt").read_text() == "years of work"
    assert_error(compress(cli_folder, "-o", out / "thesis.txt"), "is a file")


def test_without_a_model_the_default_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGE_DTM_CACHE", str(tmp_path / "cache"))
    assert_error(run("compress", "-o", tmp_path / "out"), "tools/make_smollm2.py")


def test_a_quantized_source_is_warned_about(
    compress: Compress, cli_folder: Path, tmp_path: Path
) -> None:
    from edge_dtm.formats.plan import uniform
    from edge_dtm.host.checkpoint.open import open_checkpoint
    from edge_dtm.host.export import export_gguf, fixed_bytes

    checkpoint = open_checkpoint(cli_folder)
    plan = uniform(checkpoint.components(), "Q4_0", fixed_bytes(checkpoint))
    importance: dict[str, Any] = {}
    export_gguf(checkpoint, plan, tmp_path / "q4.gguf", importance)
    result = compress(tmp_path / "q4.gguf", "--max-bytes", "100K")
    assert_error(result, "smallest plan", progress=True)
    assert "warning: q4.gguf is already quantized (Q4_0)" in result.stderr
