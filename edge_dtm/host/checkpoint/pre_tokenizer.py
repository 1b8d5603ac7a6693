"""Whether llama.cpp gives the checkpoint's tokens, and with which pre-tokenizer."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from contextlib import closing
from itertools import takewhile
from pathlib import Path

import gguf

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.data import packaged_records
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


def tokenization_mismatches(
    tokenizer: Tokenizer, gguf_path: Path, texts: Iterable[str]
) -> list[str]:
    """Where llama.cpp, with the vocabulary in `gguf_path`, disagrees with the checkpoint.

    EdgeDtmError when llama.cpp does not load the vocabulary.
    """
    with LlamaVocab(gguf_path) as vocab:
        return _mismatches(vocab, ((text, tokenizer.encode(text)) for text in texts))


def _mismatches(vocab: LlamaVocab, expected: Iterable[tuple[str, list[int]]]) -> list[str]:
    out = []
    for text, ids in expected:
        llama_cpp_ids = vocab.encode(text)
        if llama_cpp_ids != ids:
            pairs = zip(ids, llama_cpp_ids, strict=False)
            at = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
            out.append(
                f"{text[:60]!r} is {ids[at : at + 5]} for the checkpoint and "
                f"{llama_cpp_ids[at : at + 5]} for llama.cpp from token {at} on"
            )
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
    texts = [*PROBE_TEXTS]
    for record in packaged_records():
        messages = record.get("messages", [{"content": record.get("prompt")}])
        texts += [message["content"] for message in messages]
    expected = [(text, encode(text)) for text in texts]
    wrong: dict[str, list[str]] = {}
    refused = None
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "vocab.gguf"
        with closing(gguf.GGUFWriter(path, "llama")) as writer:
            add_metadata(writer)
            write_head(writer)
        for pre in PRE_CANDIDATES:
            try:
                vocab = LlamaVocab(path, pre=pre)
            except EdgeDtmError as error:
                refused = error
                continue
            with vocab:
                wrong[pre] = _mismatches(vocab, expected)
            if not wrong[pre]:
                return pre
    if not wrong:
        raise refused or AssertionError
    closest = min(wrong, key=lambda pre: len(wrong[pre]))
    raise EdgeDtmError(
        f"{folder}: no pre-tokenizer of llama.cpp gives this tokenizer's tokens; with the "
        f"closest, {closest}, {len(wrong[closest])} of {len(expected)} texts differ: "
        f"{wrong[closest][0]}"
    )


def write_head(writer: gguf.GGUFWriter) -> None:
    """Metadata and tensor heads, all of a GGUF that comes before the tensors' data."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
