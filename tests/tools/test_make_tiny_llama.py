"""Every variant of the tiny checkpoint loads and computes; a few steps of training are enough."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fixtures import tiny_llama as tiny

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TEXTS = [
    "Hello world",
    "Once upon a time there was a lamp near the harbour.",
    "def add(a, b):\n    return a + b  # 12 + 7 = 19",
    "Mañana iré al mercado; ça va, 你好 🙂!",
    "two  spaces and a trailing one ",
]
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tied": True, "layers": 1},
    "shards": {"shards": 2},
    "bpe": {"tokenizer": "bpe", "layers": 1},
    "bpe-tied-shards": {"tokenizer": "bpe", "tied": True, "shards": 3, "layers": 2},
    "mistral": {"arch": "mistral", "layers": 1},
    "biases": {"attention_bias": True, "layers": 1},
    "llama3-rope": {"rope_scaling": "llama3", "layers": 1},
}


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Make each variant once, however many tests look at it."""
    root = tmp_path_factory.mktemp("tiny")

    def get(variant: str) -> Path:
        folder = root / variant
        if not folder.exists():
            tiny.make_tiny_llama(folder, steps=5, **VARIANTS[variant])
        return folder

    return get


@pytest.mark.parametrize("variant", VARIANTS)
def test_folder_loads_and_logits_are_finite(variant: str, folder_of: Callable[[str], Path]) -> None:
    folder = folder_of(variant)
    options = VARIANTS[variant]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer(TEXTS[1], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    assert logits.shape == (1, ids.shape[1], 768)
    assert torch.isfinite(logits).all()
    assert int(ids.max()) < len(tokenizer) <= model.config.vocab_size
    arch = "Mistral" if options.get("arch") == "mistral" else "Llama"
    assert type(model).__name__ == f"{arch}ForCausalLM"
    assert model.config.tie_word_embeddings is options.get("tied", False)
    assert model.config.num_hidden_layers == options.get("layers", 3)
    chat = tokenizer.apply_chat_template(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert "Be brief." in chat and "Hello" in chat
    # No row of a matrix may be shorter than one K-quant super-block.
    for name, value in model.state_dict().items():
        if value.ndim == 2:
            assert value.shape[1] % 256 == 0, name


@pytest.mark.parametrize("variant", ["shards", "bpe-tied-shards"])
def test_shards_are_several_files(variant: str, folder_of: Callable[[str], Path]) -> None:
    folder = folder_of(variant)
    count = VARIANTS[variant]["shards"]
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(files) == count
    assert sorted(set(index["weight_map"].values())) == files
    sizes = [(folder / name).stat().st_size for name in files]
    assert max(sizes) < 2 * min(sizes)
    tied = VARIANTS[variant].get("tied", False)
    assert ("lm_head.weight" in index["weight_map"]) is not tied


def test_sharding_changes_no_weight(folder_of: Callable[[str], Path]) -> None:
    load = transformers.AutoModelForCausalLM.from_pretrained
    whole = load(folder_of("plain")).state_dict()
    parts = load(folder_of("shards")).state_dict()
    assert whole.keys() == parts.keys()
    # Also the test that one seed gives one model: the two were trained separately.
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_seed_changes_the_weights(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    load = transformers.AutoModelForCausalLM.from_pretrained
    other = tiny.make_tiny_llama(tmp_path / "other", steps=0, seed=1)
    ours = load(folder_of("plain")).lm_head.weight
    assert not torch.equal(ours, load(other).lm_head.weight)


@pytest.mark.parametrize("text", TEXTS)
def test_sentencepiece_tokenizer_agrees_with_the_library(
    text: str, folder_of: Callable[[str], Path]
) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    from tokenizers import Tokenizer

    folder = folder_of("plain")
    sp = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    expected = [1, *sp.encode(text)]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer(text)["input_ids"] == expected
    assert Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids == expected
    assert tokenizer.decode(expected, skip_special_tokens=True) == text
    assert (sp.unk_id(), sp.bos_id(), sp.eos_id()) == (0, 1, 2)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)


@pytest.mark.parametrize("text", TEXTS)
def test_bpe_tokenizer_round_trips(text: str, folder_of: Callable[[str], Path]) -> None:
    from tokenizers import Tokenizer

    folder = folder_of("bpe")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text)["input_ids"]
    assert ids == Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
    assert tokenizer.decode(ids) == text
    assert tokenizer("<|im_start|>user")["input_ids"][0] == 766
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"]) == [765, 767]


def test_biases_are_stored_and_trained(folder_of: Callable[[str], Path]) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder_of("biases"))
    for name in ("q_proj", "v_proj", "o_proj"):
        bias = getattr(model.model.layers[0].self_attn, name).bias
        assert bias is not None and float(bias.detach().abs().max()) > 0


def test_rope_scaling_is_in_the_config(folder_of: Callable[[str], Path]) -> None:
    config = transformers.AutoConfig.from_pretrained(folder_of("llama3-rope"))
    assert config.rope_parameters["rope_type"] == "llama3"
    assert config.rope_parameters["factor"] == 4.0


def test_existing_folder_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "there"
    folder.mkdir()
    assert tiny.main([str(folder), "--steps", "1"]) == 1
    message = capsys.readouterr().err.strip()
    assert "exists already" in message and "\n" not in message
    assert list(tmp_path.iterdir()) == [folder] and list(folder.iterdir()) == []


@pytest.mark.parametrize(
    "options",
    [
        {"tokenizer": "wordpiece"},
        {"arch": "gemma"},
        {"rope_scaling": "linear"},
        {"steps": -1},
        {"shards": 0},
        {"layers": 0},
        {"shards": 99},
        {"arch": "mistral", "attention_bias": True},
    ],
)
def test_bad_options_leave_nothing_behind(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(tiny.TinyLlamaError):
        tiny.make_tiny_llama(tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []
