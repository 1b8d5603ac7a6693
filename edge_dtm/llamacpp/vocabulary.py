"""The tokenizer of a GGUF as llama.cpp runs it, without loading any weights."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from edge_dtm.core.errors import EdgeDtmError

_LOG_LEVEL_ERROR = 4  # enum ggml_log_level
# enum llama_token_attr: unknown, control, user-defined; text is split at such tokens.
_SPLITTING = 1 | 8 | 16
_PRE_KEY = b"tokenizer.ggml.pre"


class LlamaVocab:
    """A GGUF's vocabulary in llama.cpp; a context manager, or call `close`.

    pre: a value of tokenizer.ggml.pre to use instead of the file's. EdgeDtmError when llama.cpp
    refuses the file, with its own words.
    """

    def __init__(self, path: Path, *, pre: str | None = None) -> None:
        import llama_cpp.llama_cpp as library

        self._lib: Any = library
        params = self._lib.llama_model_default_params()
        params.vocab_only = True
        params.n_gpu_layers = 0
        overrides = (self._lib.llama_model_kv_override * 2)()  # an empty key ends the list
        if pre is not None:
            overrides[0].key = _PRE_KEY
            overrides[0].tag = self._lib.LLAMA_KV_OVERRIDE_TYPE_STR
            overrides[0].value.val_str = pre.encode()
            params.kv_overrides = overrides
        with _quiet(self._lib) as errors:
            self._model = self._lib.llama_model_load_from_file(os.fsencode(path), params)
        if not self._model:
            why = errors[0] if errors else "no reason given"
            raise EdgeDtmError(f"llama.cpp cannot read the tokenizer of {path}: {why}")
        self._vocab = self._lib.llama_model_get_vocab(self._model)
        self.n_tokens: int = int(self._lib.llama_vocab_n_tokens(self._vocab))

    def __enter__(self) -> LlamaVocab:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the vocabulary; harmless when done before."""
        if self._model:
            self._lib.llama_model_free(self._model)
            self._model = self._vocab = None

    def __del__(self) -> None:
        if getattr(self, "_model", None):
            self.close()

    @property
    def bos_id(self) -> int | None:
        """The BOS token, or None without one."""
        token = int(self._lib.llama_vocab_bos(self._vocab))
        return token if token >= 0 else None

    @property
    def adds_bos(self) -> bool:
        """Whether `encode` puts BOS first."""
        return bool(self._lib.llama_vocab_get_add_bos(self._vocab))

    def eos_ids(self) -> tuple[int, ...]:
        """Every token at which llama.cpp ends a generation, rising."""
        is_eog = self._lib.llama_vocab_is_eog
        return tuple(i for i in range(self.n_tokens) if is_eog(self._vocab, i))

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        """Token ids; special tokens in the text are parsed, BOS and EOS added as the file says."""
        data = text.encode("utf-8")
        room = len(data) + 8
        # Quiet, for it warns of every text that begins with BOS.
        with _quiet(self._lib):
            for _ in range(2):
                ids = (self._lib.llama_token * room)()
                count = self._lib.llama_tokenize(
                    self._vocab, data, len(data), ids, room, add_special, True
                )
                if count >= 0:
                    return list(ids[:count])
                room = -count
        raise EdgeDtmError(f"llama.cpp cannot tokenize {text[:40]!r}")

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens spelled out, less a BOS that `encode` would add."""
        # Not llama_detokenize: it drops spaces before punctuation, and keeps the space prefix
        # behind a BOS.
        prefix = b"".join(map(self._piece, self.encode("x", add_special=False))).startswith(b" ")
        out: list[bytes] = []
        after_special = True
        rest = ids[1:] if self.adds_bos and len(ids) and ids[0] == self.bos_id else ids
        for token in rest:
            piece = self._piece(token)
            special = bool(self._lib.llama_vocab_get_attr(self._vocab, token) & _SPLITTING)
            if prefix and after_special and not special:
                piece = piece.removeprefix(b" ")
            out.append(piece)
            after_special = special
        return b"".join(out).decode("utf-8", errors="replace")

    def _piece(self, token: int) -> bytes:
        room = 64
        for _ in range(2):
            buffer = ctypes.create_string_buffer(room)
            count = self._lib.llama_token_to_piece(self._vocab, token, buffer, room, 0, True)
            if count >= 0:
                return buffer.raw[:count]
            room = -count
        raise EdgeDtmError(f"llama.cpp cannot turn token {token} into text")


@contextmanager
def _quiet(lib: Any) -> Iterator[list[str]]:
    """Collects llama.cpp's error lines and drops the rest; the former log comes back after."""
    errors: list[str] = []

    def note(level: int, text: bytes, _user_data: Any) -> None:
        if level == _LOG_LEVEL_ERROR:
            errors.append(text.decode("utf-8", errors="replace").strip())

    callback = lib.llama_log_callback(note)
    former, user_data = lib.llama_log_callback(), ctypes.c_void_p()
    # Older builds cannot say what the log was; a NULL callback then means stderr, their default.
    if hasattr(lib, "llama_log_get"):
        lib.llama_log_get(ctypes.byref(former), ctypes.byref(user_data))
    lib.llama_log_set(callback, ctypes.c_void_p(0))
    try:
        yield errors
    finally:
        lib.llama_log_set(former, user_data)
