"""A checkpoint's tokenizer: its ids, its chat prompts and its GGUF metadata.

The files of the checkpoint are the ground truth, not the class that transformers picks for them:
AutoTokenizer of transformers 5 rebuilds some tokenizers from the class named in the config.
Measured with 5.23: a Llama-2 folder loses the dummy prefix before text that begins with a space
or follows a special token, and a tokenizer.json whose config names GPT2Tokenizer loses its digit
splitting. So tokenizer.model goes through the sentencepiece library, and tokenizer.json through
the class of transformers that takes the file as it is.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import Any, NoReturn, Protocol

import gguf
import jinja2
from gguf import GGUFValueType, TokenType
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.llamacpp.vocabulary import LlamaVocab

Message = dict[str, str]

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
NASTY_STRINGS: tuple[str, ...] = (
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


class Tokenizer(Protocol):
    """What the rest of edge-dtm needs of a tokenizer."""

    vocab_size: int
    """Tokens, equal to the rows of the embedding matrix."""

    @property
    def has_chat_template(self) -> bool: ...

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Tokens that end a generation."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids with the special tokens the tokenizer adds; special tokens in `text` are parsed."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text with special tokens spelled out, less a leading BOS that `encode` would add."""
        ...

    def encode_chat(self, messages: list[Message]) -> tuple[list[int], str]:
        """Ids of the conversation with the generation prompt, and the text that encodes to them.

        EdgeDtmError when the template refuses the messages, or no text encodes to its ids.
        """
        ...

    def add_metadata(self, writer: gguf.GGUFWriter) -> None:
        """Write tokenizer.ggml.* and tokenizer.chat_template."""
        ...


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
        found = vocab.encode(text)
        if found != list(ids):
            out.append(Mismatch(text, tuple(ids), tuple(found)))
    return out


class _Generation(Extension):
    """`{% generation %}`, with which some templates mark the model's turns for training."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _render_chat(template: str, messages: Sequence[Message], special: Mapping[str, str]) -> str:
    """A chat template's text, with the environment that transformers gives such templates."""

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        # Jinja's own filter escapes for HTML, which no model was trained on.
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(template).render(
            messages=messages, tools=None, documents=None, add_generation_prompt=True, **special
        )
    # A template is a program: it may also fail with TypeError, OverflowError and others.
    except Exception as error:
        raise EdgeDtmError(f"the chat template cannot render these messages: {error}") from None


class _Encoder(Protocol):
    def encode(self, text: str, *, add_special: bool = True) -> list[int]: ...


def _encode_chat(
    encoder: _Encoder,
    template: str | None,
    messages: Sequence[Message],
    special: Mapping[str, str],
    added_bos: str | None,
) -> tuple[list[int], str]:
    """See Tokenizer.encode_chat. added_bos: the text of the BOS that `encoder` adds by itself."""
    if not template:
        raise EdgeDtmError("this model has no chat template: give prompts instead of messages")
    rendered = _render_chat(template, messages, special)
    text = rendered
    if added_bos and rendered.startswith(added_bos):
        text = rendered[len(added_bos) :]
    wanted = encoder.encode(rendered, add_special=False)
    ids = encoder.encode(text)
    # Templates without BOS for tokenizers that add it are common (TinyLlama's), and whatever runs
    # the GGUF adds it to them too; so the ids with BOS are what counts there.
    without_bos = ids[1:] if added_bos and text == rendered else ids
    if wanted != without_bos:
        raise EdgeDtmError(
            f"the chat template's text does not encode to its tokens: it begins "
            f"{rendered[:40]!r}, and the tokenizer adds special tokens to that; give prompts "
            f"instead of messages, or mend the template or add_bos_token / add_eos_token"
        )
    return ids, text


@dataclass
class _Table:
    """The vocabulary as GGUF wants it; scores for "llama", merges for "gpt2"."""

    model: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None = None
    merges: list[str] | None = None
    add_space_prefix: bool | None = None

    def pad(self, vocab_size: int, folder: Path) -> None:
        if len(self.tokens) > vocab_size:
            raise EdgeDtmError(
                f"{folder}: the tokenizer has {len(self.tokens)} tokens, but the model only "
                f"{vocab_size}; take tokenizer files that belong to the model"
            )
        missing = range(len(self.tokens), vocab_size)
        self.tokens += [f"[PAD{i}]" for i in missing]
        self.types += [TokenType.UNUSED] * len(missing)
        if self.scores is not None:
            self.scores += [-1000.0] * len(missing)


@dataclass
class _Special:
    """Ids of special tokens, None without one, and which of them are added to every text."""

    bos: int | None
    eos: int | None
    unk: int | None
    pad: int | None
    add_bos: bool
    add_eos: bool


class _SentencePiece:
    """tokenizer.model through the sentencepiece library, split at special tokens.

    Every piece of text between special tokens gets the dummy prefix, as in Llama-2's first
    tokenizer ("legacy") and in llama.cpp.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], proto: Any) -> None:
        from sentencepiece import SentencePieceProcessor

        self._prefix = bool(
            proto.normalizer_spec.add_dummy_prefix and config.get("add_prefix_space") is not False
        )
        # Added by hand below, where wanted.
        proto.normalizer_spec.add_dummy_prefix = False
        sp = SentencePieceProcessor(model_proto=proto.SerializeToString())
        self._sp = sp
        self._size = sp.get_piece_size()
        tokens = [sp.id_to_piece(i) for i in range(self._size)]
        scores = [float(sp.get_score(i)) for i in range(self._size)]
        types = [int(piece.type) for piece in proto.pieces]  # numbered as in GGUF
        added = _added_tokens(folder, config)
        for index, (content, special) in sorted(added.items()):
            while len(tokens) <= index:
                tokens.append(f"[PAD{len(tokens)}]")
                scores.append(-1000.0)
                types.append(TokenType.UNUSED)
            if tokens[index] == content and types[index] in (TokenType.UNKNOWN, TokenType.CONTROL):
                continue
            if tokens[index] != content or index >= self._size:
                scores[index] = -1000.0
            tokens[index] = content
            types[index] = TokenType.CONTROL if special else TokenType.USER_DEFINED
        self.table = _Table("llama", tokens, types, scores, add_space_prefix=self._prefix)
        self._special_ids = {
            token: i
            for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
            if kind in (TokenType.CONTROL, TokenType.UNKNOWN) or i in added
        }
        self._special_tokens = {i: token for token, i in self._special_ids.items()}
        longest_first = sorted(self._special_ids, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")

        def named(kind: str, default: int) -> int | None:
            content = _content(config.get(f"{kind}_token"))
            found = self._special_ids.get(content) if content else None
            return found if found is not None else (default if default >= 0 else None)

        self.special = _Special(
            bos=named("bos", sp.bos_id()),
            eos=named("eos", sp.eos_id()),
            unk=named("unk", sp.unk_id()),
            pad=named("pad", sp.pad_id()),
            add_bos=config.get("add_bos_token") is not False,
            add_eos=bool(config.get("add_eos_token")),
        )
        self.special.add_bos &= self.special.bos is not None
        self.special.add_eos &= self.special.eos is not None

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        ids: list[int] = []
        if add_special and self.special.add_bos and self.special.bos is not None:
            ids.append(self.special.bos)
        for part in self._split.split(text):
            if part in self._special_ids:
                ids.append(self._special_ids[part])
            elif part:
                ids += self._sp.encode(" " + part if self._prefix else part)
        if add_special and self.special.add_eos and self.special.eos is not None:
            ids.append(self.special.eos)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        def decode_run(run: list[int]) -> str:
            text = str(self._sp.decode(run))
            return text[1:] if self._prefix and text.startswith(" ") else text

        # Padding has no piece in the model.
        padding = {i: self.table.tokens[i] for i in ids if i >= self._size}
        return _decode(ids, padding | self._special_tokens, decode_run)


def _decode(
    ids: Sequence[int], special: Mapping[int, str], decode_run: Callable[[list[int]], str]
) -> str:
    """Runs between special tokens decoded one by one: each may have a space prefix to drop."""
    parts = []
    for is_special, group in groupby(ids, key=special.__contains__):
        run = list(group)
        parts += [special[i] for i in run] if is_special else [decode_run(run)]
    return "".join(parts)


class _TokenizerJson:
    """tokenizer.json as it stands, through the `tokenizers` library."""

    def __init__(self, folder: Path) -> None:
        # Not AutoTokenizer: see the module's docstring. This class honours add_bos_token.
        from transformers import PreTrainedTokenizerFast

        try:
            hf = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
            data = json.loads((folder / "tokenizer.json").read_text("utf-8"))
        except Exception as error:  # the library raises bare Exception for a malformed file
            raise EdgeDtmError(f"{folder}: tokenizer.json cannot be used: {error}") from None
        self._backend = hf.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        model = data["model"]
        if model.get("type") != "BPE":
            raise EdgeDtmError(
                f"{folder}: tokenizer.json is of type {model.get('type')}, but only BPE is "
                f"supported"
            )
        plain, full = self.encode("a", add_special=False), self.encode("a")
        starts = [i for i in range(len(full)) if full[i : i + len(plain)] == plain]
        before = full[: starts[0]] if starts else full
        after = full[len(before) + len(plain) :]
        if before not in ([], [hf.bos_token_id]) or after not in ([], [hf.eos_token_id]):
            raise EdgeDtmError(
                f"{folder}: the tokenizer turns 'a' into {full}; only one BOS before and one EOS "
                f"after a text can be expressed in a GGUF"
            )
        self.special = _Special(
            hf.bos_token_id, hf.eos_token_id, hf.unk_token_id, hf.pad_token_id,
            add_bos=bool(before), add_eos=bool(after),
        )  # fmt: skip
        self._added: dict[int, str] = {}
        self.table = self._make_table(folder, model)

    def _make_table(self, folder: Path, model: Mapping[str, Any]) -> _Table:
        vocab: dict[str, int] = self._backend.get_vocab(with_added_tokens=True)
        size = max(vocab.values()) + 1
        tokens = [f"[PAD{i}]" for i in range(size)]
        types = [int(TokenType.UNUSED)] * size
        like_sentencepiece = bool(model.get("byte_fallback"))
        for token, i in vocab.items():
            tokens[i] = token
            types[i] = int(TokenType.NORMAL)
            if like_sentencepiece and re.fullmatch("<0x[0-9A-Fa-f]{2}>", token):
                types[i] = TokenType.BYTE
        for i, added in self._backend.get_added_tokens_decoder().items():
            self._added[i] = tokens[i] = added.content
            types[i] = TokenType.CONTROL if added.special else TokenType.USER_DEFINED
        if not like_sentencepiece:
            merges = gguf.SpecialVocab(folder, load_merges=True).merges
            return _Table("gpt2", tokens, types, merges=merges)
        if model.get("unk_token") in vocab:
            types[vocab[model["unk_token"]]] = TokenType.UNKNOWN
        # llama.cpp merges the pair whose result scores highest; gguf.vocab.LlamaHfVocab writes
        # one score for all, which merges in the wrong order. The rank of the merge is the score.
        scores = [-1e6] * size
        for rank, pair in enumerate(model["merges"]):
            left, right = pair.split(" ") if isinstance(pair, str) else pair
            index = vocab.get(left + right)
            if index is not None:
                scores[index] = max(scores[index], -float(rank))
        first = self._backend.encode("a", add_special_tokens=False).tokens
        prefix = bool(first) and first[0].startswith("▁")
        return _Table("llama", tokens, types, scores, add_space_prefix=prefix)

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        return list(self._backend.encode(text, add_special_tokens=add_special).ids)

    def decode(self, ids: Sequence[int]) -> str:
        return _decode(ids, self._added, self._backend.decode)


class HfTokenizer:
    """The tokenizer of a Hugging Face folder: tokenizer.model, else tokenizer.json."""

    def __init__(
        self,
        folder: Path,
        vocab_size: int,
        backend: _SentencePiece | _TokenizerJson,
        chat_template: str | None,
    ) -> None:
        self.vocab_size = vocab_size
        self._folder = folder
        self._backend = backend
        self._chat_template = chat_template
        self._pre: str | None = None
        backend.table.pad(vocab_size, folder)
        self.eos_ids = self._find_eos()
        if not self.eos_ids:
            raise EdgeDtmError(
                f"{folder} names no end-of-sequence token; add eos_token_id to config.json"
            )

    @classmethod
    def from_folder(cls, folder: Path, vocab_size: int) -> HfTokenizer:
        """vocab_size: rows of the embedding matrix.

        EdgeDtmError when the folder has no tokenizer, one that a GGUF cannot hold, or one with
        more tokens than the model.
        """
        config = _config(folder)
        proto = _sentencepiece_proto(folder / "tokenizer.model")
        backend: _SentencePiece | _TokenizerJson
        if proto is not None:
            backend = _SentencePiece(folder, config, proto)
        elif (folder / "tokenizer.json").is_file():
            backend = _TokenizerJson(folder)
        else:
            raise EdgeDtmError(
                f"{folder} has no tokenizer: neither tokenizer.json nor a SentencePiece "
                f"tokenizer.model is there"
            )
        return cls(folder, vocab_size, backend, _chat_template(folder, config))

    @property
    def has_chat_template(self) -> bool:
        return bool(self._chat_template)

    def encode(self, text: str) -> list[int]:
        """See Tokenizer.encode."""
        return self._backend.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """See Tokenizer.decode."""
        special = self._backend.special
        drop = special.add_bos and len(ids) > 0 and ids[0] == special.bos
        return self._backend.decode(ids[1:] if drop else ids)

    def encode_chat(self, messages: list[Message]) -> tuple[list[int], str]:
        """See Tokenizer.encode_chat."""
        special = self._backend.special
        texts = {
            f"{name}_token": "" if i is None else self._backend.table.tokens[i]
            for name, i in (
                ("bos", special.bos),
                ("eos", special.eos),
                ("unk", special.unk),
                ("pad", special.pad),
            )
        }
        added_bos = texts["bos_token"] if special.add_bos else None
        return _encode_chat(self._backend, self._chat_template, messages, texts, added_bos)

    def add_metadata(self, writer: gguf.GGUFWriter) -> None:
        """See Tokenizer.add_metadata.

        EdgeDtmError when no pre-tokenizer of llama.cpp gives a byte-level BPE's tokens; the
        message shows the first text that differs.
        """
        if self._backend.table.model == "gpt2" and self._pre is None:
            self._pre = self._find_pre()
        self._write(writer, self._pre)

    def _write(self, writer: gguf.GGUFWriter, pre: str | None) -> None:
        table, special = self._backend.table, self._backend.special
        writer.add_tokenizer_model(table.model)
        if pre is not None:
            writer.add_tokenizer_pre(pre)
        writer.add_token_list(table.tokens)
        writer.add_token_types(table.types)
        if table.scores is not None:
            writer.add_token_scores(table.scores)
        if table.merges is not None:
            writer.add_token_merges(table.merges)
        if table.add_space_prefix is not None:
            writer.add_add_space_prefix(table.add_space_prefix)
        eos = special.eos if special.eos is not None else self.eos_ids[0]
        # Without these llama.cpp takes ids of its own (1 and 2, or 11) for BOS and EOS.
        writer.add_bos_token_id(special.bos if special.bos is not None else self._config_bos(eos))
        writer.add_eos_token_id(eos)
        if special.unk is not None:
            writer.add_unk_token_id(special.unk)
        if special.pad is not None:
            writer.add_pad_token_id(special.pad)
        # llama.cpp ends a generation at EOS, EOT and EOM, and at some tokens it knows by name.
        others = [i for i in self.eos_ids if i != eos]
        for add, index in zip((writer.add_eot_token_id, writer.add_eom_token_id), others):  # noqa: B905
            add(index)
        writer.add_add_bos_token(special.add_bos)
        writer.add_add_eos_token(special.add_eos)
        if self._chat_template:
            writer.add_chat_template(self._chat_template)

    def _find_eos(self) -> tuple[int, ...]:
        found = [] if self._backend.special.eos is None else [self._backend.special.eos]
        for name in ("generation_config.json", "config.json"):
            value = _read_json(self._folder / name).get("eos_token_id")
            found += [i for i in (value if isinstance(value, list) else [value]) if i is not None]
        return tuple(dict.fromkeys(int(i) for i in found if 0 <= int(i) < self.vocab_size))

    def _config_bos(self, default: int) -> int:
        value = _read_json(self._folder / "config.json").get("bos_token_id")
        return value if isinstance(value, int) and 0 <= value < self.vocab_size else default

    def _find_pre(self) -> str:
        """The pre-tokenizer's name, which no file tells: the first that gives the same tokens."""
        expected = [(text, self.encode(text)) for text in (*NASTY_STRINGS, *_probe_prompts())]
        best: tuple[str, list[Mismatch]] | None = None
        refused: EdgeDtmError | None = None
        with tempfile.TemporaryDirectory() as temporary:
            path = Path(temporary) / "vocab.gguf"
            _write_vocab_gguf(path, lambda writer: self._write(writer, PRE_CANDIDATES[0]))
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
            raise refused or EdgeDtmError(f"{self._folder}: llama.cpp accepts no pre-tokenizer")
        raise EdgeDtmError(
            f"{self._folder}: no pre-tokenizer of llama.cpp gives this tokenizer's tokens; with "
            f"the closest, {best[0]}, {len(best[1])} of {len(expected)} texts differ: {best[1][0]}"
        )


class GgufTokenizer:
    """The tokenizer inside a GGUF, run by llama.cpp; its metadata is copied as it is."""

    def __init__(self, path: Path, vocab: LlamaVocab, fields: Mapping[str, Any]) -> None:
        self._vocab = vocab
        self._fields = fields
        self._path = path
        self.vocab_size = vocab.n_tokens
        self.eos_ids = vocab.eos_ids()

    @classmethod
    def from_gguf(cls, path: Path) -> GgufTokenizer:
        """EdgeDtmError when the file holds no tokenizer, or one that llama.cpp refuses."""
        try:
            reader = gguf.GGUFReader(path)
        except (OSError, ValueError) as error:
            raise EdgeDtmError(f"{path} cannot be read as GGUF: {error}") from None
        fields = {
            name: field for name, field in reader.fields.items() if name.startswith("tokenizer.")
        }
        if "tokenizer.ggml.tokens" not in fields:
            raise EdgeDtmError(f"{path} holds no tokenizer (tokenizer.ggml.tokens is missing)")
        return cls(path, LlamaVocab(path), fields)

    @property
    def has_chat_template(self) -> bool:
        return self._chat_template is not None

    @property
    def _chat_template(self) -> str | None:
        field = self._fields.get("tokenizer.chat_template")
        return (field.contents() or None) if field is not None else None

    def encode(self, text: str) -> list[int]:
        """See Tokenizer.encode."""
        return self._vocab.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """See Tokenizer.decode."""
        return self._vocab.decode(ids)

    def encode_chat(self, messages: list[Message]) -> tuple[list[int], str]:
        """See Tokenizer.encode_chat."""
        texts = {
            f"{name}_token": self._token_text(f"tokenizer.ggml.{key}_token_id")
            for name, key in (
                ("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"),
            )
        }  # fmt: skip
        bos = self._vocab.bos_id
        if bos is not None and self._vocab.adds_bos:
            texts["bos_token"] = self._token(bos)
        added_bos = texts["bos_token"] if self._vocab.adds_bos else None
        return _encode_chat(self._vocab, self._chat_template, messages, texts, added_bos)

    def _token(self, index: int) -> str:
        return str(self._fields["tokenizer.ggml.tokens"].contents(index))

    def _token_text(self, key: str) -> str:
        field = self._fields.get(key)
        index = -1 if field is None else int(field.contents())
        return self._token(index) if 0 <= index < self.vocab_size else ""

    def add_metadata(self, writer: gguf.GGUFWriter) -> None:
        """Copy every tokenizer.* field with its type."""
        for name, field in self._fields.items():
            kind = field.types[0]
            if kind == GGUFValueType.STRING:
                writer.add_key_value(name, field.parts[-1].tobytes(), kind)
            elif kind != GGUFValueType.ARRAY:
                writer.add_key_value(name, field.contents(), kind)
            elif len(field.data):  # the writer has no empty arrays; llama.cpp reads none the same
                inner = field.types[-1]
                value = (
                    [field.parts[i].tobytes() for i in field.data]
                    if inner == GGUFValueType.STRING
                    else field.contents()
                )
                writer.add_key_value(name, value, kind, inner)


def _write_vocab_gguf(path: Path, add_metadata: Callable[[gguf.GGUFWriter], None]) -> None:
    """A GGUF of the Llama architecture with a tokenizer and no tensors."""
    writer = gguf.GGUFWriter(path, "llama")
    add_metadata(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()


def _probe_prompts() -> list[str]:
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


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty when the file is missing. EdgeDtmError when it is malformed."""
    try:
        data = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise EdgeDtmError(f"{path} cannot be read: {error}") from None
    if not isinstance(data, dict):
        raise EdgeDtmError(f"{path} does not hold a JSON object")
    return data


def _config(folder: Path) -> dict[str, Any]:
    return _read_json(folder / "special_tokens_map.json") | _read_json(
        folder / "tokenizer_config.json"
    )


def _content(entry: Any) -> str | None:
    """The text of a token that a config gives as a string or as an object."""
    value = entry.get("content") if isinstance(entry, dict) else entry
    return value if isinstance(value, str) else None


def _added_tokens(folder: Path, config: Mapping[str, Any]) -> dict[int, tuple[str, bool]]:
    """id -> (text, whether special) of the tokens a SentencePiece folder adds to its model."""
    found: dict[int, tuple[str, bool]] = {}
    for content, index in _read_json(folder / "added_tokens.json").items():
        found[int(index)] = (content, False)
    for added in _read_json(folder / "tokenizer.json").get("added_tokens", []):
        found[int(added["id"])] = (added["content"], bool(added.get("special")))
    for index, added in config.get("added_tokens_decoder", {}).items():
        found[int(index)] = (added["content"], bool(added.get("special")))
    return found


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    try:
        return (folder / "chat_template.jinja").read_text("utf-8")
    except FileNotFoundError:
        pass
    template = config.get("chat_template")
    if template is None:
        template = _read_json(folder / "chat_template.json").get("chat_template")
    if isinstance(template, list):  # several, each with a name
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("default")
    return template if isinstance(template, str) and template else None


def _sentencepiece_proto(path: Path) -> Any:
    """The parsed SentencePiece model, or None: Llama 3 has another format under that name."""
    if not path.is_file():
        return None
    from sentencepiece import sentencepiece_model_pb2

    module: Any = sentencepiece_model_pb2
    proto = module.ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except Exception:  # protobuf's DecodeError, which has no type stubs
        return None
    return proto if proto.pieces else None
