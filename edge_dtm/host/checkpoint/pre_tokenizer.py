"""Whether llama.cpp gives the checkpoint's tokens, and with which pre-tokenizer."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import gguf

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.host.checkpoint.tokenizer import Tokenizer
from edge_dtm.llamacpp.vocabulary import LlamaVocab

# All values of tokenizer.ggml.pre that a Llama-family checkpoint may need, likely ones first.
# Names that the installed llama.cpp does not know are passed over.
PRE_CANDIDATES = (
    "llama-bpe", "smollm", "gpt-2", "tekken", "qwen2", "deepseek-llm", "deepseek-coder",
    "starcoder", "refact", "command-r", "falcon", "mpt", "olmo", "gpt-4o", "default", "dbrx",
    "smaug-bpe", "stablelm2", "deepseek-v3", "deepseek-r1-qwen", "codeshell", "jais", "viking",
    "poro-chat", "bloom", "gpt3-finnish", "exaone", "exaone4", "minerva-7b", "chameleon",
    "superbpe", "trillion", "bailingmoe", "llama4", "pixtral", "seed-coder", "hunyuan",
    "hunyuan-dense", "kimi-k2", "falcon3", "falcon-h1", "megrez", "lfm2", "midm-2.0", "grok-2",
    "afmoe", "minimax-m2", "granite-docling", "qwen35", "tiny_aya", "youtu", "solar-open",
)  # fmt: skip

# Bytes such as 0x06 and 0x14 are left out: a vocabulary made from text may lack them, and then
# Hugging Face drops them while llama.cpp does something else.
PROBE_TEXTS: tuple[str, ...] = (
    "",
    " ",
    "   ",
    "Hello world",
    " leading space",
    "   three leading, two trailing  ",
    "a  b   c    d     e",
    "\ttab\t\ttabs\t",
    "windows\r\nlines\r\n\r\n",
    "lone\rcarriage\r\rreturn\r",
    "\n",
    "\n\n\nthree newlines\n\n\n\nfour\n",
    " \n \t \n  x",
    "<|im_start|>user\nHi<|im_end|>\n",
    "<s>",
    "<s> text </s> more </s>",
    "</s>no space</s>  two spaces",
    "text<|endoftext|> after",
    "[INST] <<SYS>> be brief <</SYS>> Hello [/INST]",
    "an <unk> in the middle",
    "<|im_start <|im_start| > |im_end|> < s > <s",
    "<|begin_of_text|><|eot_id|><pad>[PAD]",
    "1234567",
    "3.14159 1,000,000 2024-11-24 0x1F 12 123 1234",
    "½ ² ٣٤ Ⅷ 10³",
    "don't we'll I'M THEY'RE it's I'd you've",
    "🙂🚀",
    "👩‍👩‍👧‍👦 🇩🇪 ❤️ 👍🏽",
    "我想在苹果公司工作，你呢？",
    "日本語のテキスト。カタカナ 한국어",
    "مرحبا بالعالم، كيف حالك؟",
    "नमस्ते दुनिया",
    "Привет, мир! Ελληνικά",
    "e\u0301 versus \u00e9, n\u0303o\u0302",
    "def f(x):\n    if x:\n        return [x, {'a': 1}]\n\n\treturn None  # end\n",
    "zero\u200bwidth\u200b space",
    "\ufeffbyte order mark",
    "nbsp\u00a0here\u00a0\u00a0two, thin\u2009space",
    "pneumonoultramicroscopicsilicovolcanoconiosis" * 4,
    "a" * 100,
    "https://example.com/a/b?c=d&e=%20f#g user@example.org",
    "control \x01 bytes \x1b[0m",
    "!!!??? ...--- ===>>> \\\\ // `x` $y^2$ <b></b>",
    "— “quotes” … naïve Café ß µ",
    "▁looks like▁a space mark",
    "<0x0A> spelled byte",
)


@dataclass(frozen=True)
class Mismatch:
    """A text, the ids of the checkpoint's tokenizer and the ids llama.cpp gave instead."""

    text: str
    expected: tuple[int, ...]
    found: tuple[int, ...]

    def __str__(self) -> str:
        at = next(
            (i for i, (a, b) in enumerate(zip(self.expected, self.found, strict=False)) if a != b),
            min(len(self.expected), len(self.found)),
        )
        return (
            f"{self.text[:60]!r} is {list(self.expected[at : at + 5])} for the checkpoint and "
            f"{list(self.found[at : at + 5])} for llama.cpp from token {at} on"
        )


def tokenization_mismatches(
    tokenizer: Tokenizer, gguf_path: Path, texts: Iterable[str]
) -> list[Mismatch]:
    """Where llama.cpp, with the vocabulary in `gguf_path`, disagrees with the checkpoint.

    EdgeDtmError when llama.cpp does not load the vocabulary.
    """
    with LlamaVocab(gguf_path) as vocab:
        return _mismatches(vocab, ((text, tokenizer.encode(text)) for text in texts))


def _mismatches(vocab: LlamaVocab, expected: Iterable[tuple[str, Sequence[int]]]) -> list[Mismatch]:
    out = []
    for text, ids in expected:
        tokens = vocab.encode(text)
        if tokens != list(ids):
            out.append(Mismatch(text, tuple(ids), tuple(tokens)))
    return out


def find_pre_tokenizer(
    folder: Path,
    encode: Callable[[str], list[int]],
    add_metadata: Callable[[gguf.GGUFWriter], None],
) -> str:
    """The pre-tokenizer's name, which no file tells: the first that gives the same tokens.

    encode: the checkpoint's own; add_metadata: writes its vocabulary with any pre-tokenizer.
    EdgeDtmError when no candidate fits, with the first text that differs.
    """
    expected = [(text, encode(text)) for text in (*PROBE_TEXTS, *_packaged_texts())]
    best: tuple[str, list[Mismatch]] | None = None
    refused: EdgeDtmError | None = None
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "vocab.gguf"
        _write_vocab_gguf(path, add_metadata)
        for pre in PRE_CANDIDATES:
            try:
                vocab = LlamaVocab(path, pre=pre)
            except EdgeDtmError as error:
                refused = refused or error
                continue
            with vocab:
                wrong = _mismatches(vocab, expected)
            if not wrong:
                return pre
            if best is None or len(wrong) < len(best[1]):
                best = pre, wrong
    if best is None:
        raise refused or EdgeDtmError(f"{folder}: llama.cpp accepts no pre-tokenizer")
    raise EdgeDtmError(
        f"{folder}: no pre-tokenizer of llama.cpp gives this tokenizer's tokens; with the "
        f"closest, {best[0]}, {len(best[1])} of {len(expected)} texts differ: {best[1][0]}"
    )


def _write_vocab_gguf(path: Path, add_metadata: Callable[[gguf.GGUFWriter], None]) -> None:
    """A GGUF of the Llama architecture with a tokenizer and no tensors."""
    writer = gguf.GGUFWriter(path, "llama")
    add_metadata(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()


def _packaged_texts() -> list[str]:
    lines = files("edge_dtm.data").joinpath("prompts.jsonl").read_text("utf-8").splitlines()
    records = [json.loads(line) for line in lines if line.strip()]
    return [
        text
        for record in records
        for text in (
            [m["content"] for m in record["messages"]]
            if "messages" in record
            else [record["prompt"]]
        )
    ]
