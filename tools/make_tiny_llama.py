"""Make a tiny, really trained Llama (or Mistral) checkpoint for tests and experiments.

Output: a Hugging Face model folder with config.json, generation_config.json, safetensors weights
(float32, optionally in several shards with an index) and a tokenizer trained on the same corpus.
The model has hidden size 256, FFN size 512, 4 heads, 2 key-value heads, head size 64, 768 tokens
and a context of 512 tokens, so that every matrix row divides by 256 as K-quants want. It is
trained on template text and on docstrings of the Python standard library, so nothing is
downloaded; the same seed on the same machine gives the same folder.

Run from the repository root (about 80 seconds on two CPU cores with the default 400 steps, down
to a loss of about 1.4 nats per token). Measured on 64 prompts of edge_dtm/data, with greedy text
of at most 64 tokens: no 8-gram came twice in 59 of the 64 texts of the first model below, and in
54 of the 64 texts of a model made with --tokenizer bpe --tied.

    python tools/make_tiny_llama.py /tmp/tiny-llama
    python tools/make_tiny_llama.py /tmp/tiny-bpe --tokenizer bpe --tied --shards 3
"""

from __future__ import annotations

import argparse
import functools
import importlib
import inspect
import io
import json
import math
import os
import random
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

DEFAULT_STEPS = 400
HIDDEN_SIZE = 256
FFN_SIZE = 512
HEADS = 4
KV_HEADS = 2
HEAD_DIM = 64
VOCAB_SIZE = 768
CONTEXT = 512
SEQUENCE = 128
BATCH = 16
PEAK_LEARNING_RATE = 3e-3
# The corpus, and so the tokenizer, is the same for every --seed: only weights and order differ.
CORPUS_SEED = 20240
DOCUMENTS_PER_KIND = 260

TOKENIZERS = ("sentencepiece", "bpe")
ARCHITECTURES = ("llama", "mistral")
ROPE_SCALINGS = ("none", "llama3")

Message = dict[str, str]
Document = str | list[Message]

LLAMA_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ '<<SYS>> ' + message['content'] + ' <</SYS>> ' }}"
    "{% elif message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

STDLIB_MODULES = (
    "argparse", "array", "ast", "base64", "bisect", "calendar", "cmd", "codecs", "collections",
    "configparser", "contextlib", "copy", "csv", "datetime", "decimal", "difflib", "dis", "email",
    "enum", "fileinput", "fnmatch", "fractions", "ftplib", "functools", "getopt", "gettext",
    "glob", "gzip", "hashlib", "heapq", "html", "http.client", "imaplib", "inspect", "io",
    "ipaddress", "itertools", "json", "keyword", "linecache", "locale", "logging", "math",
    "mimetypes", "multiprocessing", "numbers", "operator", "os", "pathlib", "pickle", "platform",
    "pprint", "queue", "random", "re", "sched", "selectors", "shlex", "shutil", "smtplib",
    "socket", "socketserver", "sqlite3", "statistics", "string", "struct", "subprocess", "tarfile",
    "tempfile", "textwrap", "threading", "time", "timeit", "tokenize", "traceback", "types",
    "unittest", "urllib.parse", "urllib.request", "uuid", "warnings", "wave", "weakref",
    "xml.etree.ElementTree", "zipfile",
)  # fmt: skip

# One word a line would bury the grammar.
# fmt: off
NAMES = [
    "Anna", "Boris", "Clara", "David", "Elena", "Farid", "Grace", "Hugo", "Irene", "Jonas",
    "Kofi", "Lena", "Marta", "Nadia", "Oscar", "Paula", "Quentin", "Rosa", "Samir", "Tessa",
]
PLACES = [
    "Lisbon", "Oslo", "Cairo", "Lima", "Kyoto", "Porto", "Dublin", "Quito", "Tunis", "Hanoi",
    "Turin", "Bergen",
]
SETTINGS = [
    "the harbour", "the old mill", "the market", "a quiet village", "the railway station",
    "the library", "the mountain hut", "the school", "a small island", "the workshop",
]
ANIMALS = [
    "cat", "dog", "goat", "horse", "parrot", "turtle", "fox", "hen", "donkey", "owl",
]
JOBS = [
    "baker", "teacher", "pilot", "nurse", "carpenter", "fisher", "painter", "farmer",
    "mechanic", "clerk", "gardener", "sailor",
]
THINGS = [
    "key", "lamp", "map", "clock", "letter", "radio", "coin", "basket", "ladder", "bottle",
    "drum", "mirror", "compass",
]
COLOURS = [
    "red", "blue", "green", "yellow", "white", "black", "silver", "brown",
]
WEATHER = [
    "rain", "snow", "a strong wind", "thick fog", "bright sun", "a thunderstorm",
]
FOODS = [
    "bread", "soup", "rice", "beans", "cheese", "apples", "onions", "carrots", "lentils",
    "eggs", "honey", "tomatoes",
]
MONTHS = [
    "January", "February", "March", "April", "May", "June", "July", "August", "September",
    "October",
]
DAYS = [
    "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday",
]
SUBJECTS = [
    "the sea", "engines", "gardens", "the stars", "music", "old bridges", "sensors",
    "history", "batteries", "birds", "maps", "the weather", "bicycles", "robots",
]
VERBS = [
    "count", "merge", "find", "load", "scale", "filter", "join", "parse", "read", "sort",
]
NOUNS = [
    "items", "values", "rows", "names", "lines", "words", "points", "nodes", "files", "scores",
]
DEVICES = [
    "pump", "heater", "camera", "motor", "door lock", "fan", "router", "thermostat",
]
# fmt: on


class TinyLlamaError(ValueError):
    """A request that cannot be met; the message is one line for the person at the terminal."""


def _story(r: random.Random) -> str:
    name, friend = r.sample(NAMES, 2)
    thing, colour, place = r.choice(THINGS), r.choice(COLOURS), r.choice(SETTINGS)
    animal, weather = r.choice(ANIMALS), r.choice(WEATHER)
    opening = r.choice(
        [
            (
                f"One {r.choice(DAYS)} in {r.choice(MONTHS)}, {name} the {r.choice(JOBS)} found a "
                f"{colour} {thing} near {place}."
            ),
            (
                f"Once upon a time a {r.choice(JOBS)} named {name} lived in {r.choice(PLACES)} with a "
                f"{r.choice(COLOURS)} {animal}."
            ),
            f"Early in the morning {name} walked to {place} to look for a lost {animal}.",
        ]
    )
    middle = [
        r.choice(
            [
                f"There was {weather} that day, so nobody else was on the road.",
                f"It was {r.randint(2, 12)} o'clock and there was {weather} over the hills.",
                f"{name} had only {r.randint(2, 60)} coins and a piece of {r.choice(FOODS)}.",
            ]
        ),
        r.choice(
            [
                f'"Where did you get that {thing}?" asked {friend}, who came from the other side.',
                f"Then {friend} opened the door and said that the {thing} was very old.",
                f"After a while the {animal} ran away, and {friend} laughed for a long time.",
            ]
        ),
        r.choice(
            [
                (
                    f"Together they carried it to {r.choice(SETTINGS)}, where a {r.choice(JOBS)} "
                    f"looked at it through a glass."
                ),
                (
                    f"They shared {r.choice(FOODS)} and {r.choice(FOODS)} and talked about "
                    f"{r.choice(SUBJECTS)} until evening."
                ),
                (
                    f"Because of the {r.choice(COLOURS)} light, they could not see the way to "
                    f"{r.choice(PLACES)}."
                ),
            ]
        ),
        r.choice(
            [
                (
                    f"Nobody knew that inside the {thing} there was a small note with the number "
                    f"{r.randint(10, 999)}."
                ),
                f"At last {name} understood why the {animal} was afraid of {r.choice(SETTINGS)}.",
                f"But the next day the {thing} was gone, and only a {r.choice(THINGS)} was left.",
            ]
        ),
    ]
    ending = r.choice(
        [
            f"In the end {name} gave the {thing} to {friend} and went home happy.",
            f"Years later {friend} still told this story to the children of {r.choice(PLACES)}.",
            f"From that day on, {name} and {friend} were the best of friends.",
        ]
    )
    return " ".join([opening, *middle, ending])


def _biography(r: random.Random) -> str:
    name, place = r.choice(NAMES), r.choice(PLACES)
    year = r.randint(1900, 1990)
    return (
        f"{name} was born in {place} in {year} as the child of a {r.choice(JOBS)} and a "
        f"{r.choice(JOBS)}. At the age of {r.randint(5, 15)}, {name} began to read about "
        f"{r.choice(SUBJECTS)}. In {year + r.randint(18, 25)} {name} moved to {r.choice(PLACES)}, "
        f"where the first book about {r.choice(SUBJECTS)} was written. It sold "
        f"{r.randint(2, 90)} hundred copies. Later {name} worked as a {r.choice(JOBS)} for "
        f"{r.randint(2, 30)} years and collected {r.choice(COLOURS)} {r.choice(THINGS)}s. "
        f"Today a street near {r.choice(SETTINGS)} has that name."
    )


def _explanation(r: random.Random) -> str:
    topic = r.choice(SUBJECTS)
    device = r.choice(DEVICES)
    parts = [
        f"To understand {topic}, it helps to start with a simple example.",
        f"Imagine a {device} that has to work for {r.randint(2, 48)} hours without a break.",
        (
            f"First, it measures the {r.choice(['heat', 'speed', 'light', 'noise', 'pressure'])} every "
            f"{r.randint(2, 60)} seconds."
        ),
        f"Second, it compares the result with a limit of {r.randint(10, 500)}.",
        (
            f"If the value is too high, the {device} waits and sends a message to the "
            f"{r.choice(JOBS)}."
        ),
        r.choice(
            [
                "This matters because a small error can grow over time.",
                "The reason is that energy cannot be made from nothing.",
                "As a result, most people never see that anything went wrong.",
            ]
        ),
        f"In short, {topic} and {r.choice(SUBJECTS)} have more in common than one may think.",
    ]
    return " ".join(parts)


def _numbered_list(r: random.Random) -> str:
    kind = r.randrange(3)
    count = r.randint(5, 9)
    if kind == 0:
        title = f"Things to pack for a trip to {r.choice(PLACES)}:"
        pool = r.sample(THINGS, count)
        items = [f"a {r.choice(COLOURS)} {thing}" for thing in pool]
    elif kind == 1:
        title = f"Shopping list for {r.choice(DAYS)}:"
        items = [f"{r.randint(2, 20)} bags of {food}" for food in r.sample(FOODS, count)]
    else:
        title = f"People who came to {r.choice(SETTINGS)}:"
        items = [f"{name}, {r.choice(JOBS)}" for name in r.sample(NAMES, count)]
    bullet = r.choice(["{}. ", "- "])
    return "\n".join([title, *(bullet.format(i + 1) + item for i, item in enumerate(items))])


def _recipe(r: random.Random) -> str:
    first, second, third = r.sample(FOODS, 3)
    return "\n".join(
        [
            f"Recipe: {first} with {second}",
            f"Serves {r.randint(2, 8)}.",
            f"1. Wash {r.randint(100, 900)} grams of {first} in cold water.",
            f"2. Cut the {second} into {r.choice(['small', 'thin', 'large'])} pieces.",
            f"3. Heat the oil for {r.randint(2, 9)} minutes and add the {second}.",
            f"4. Stir in the {third} and a little salt.",
            f"5. Cook everything for {r.randint(10, 60)} minutes over low heat.",
            f"6. Serve with {r.choice(FOODS)} and enjoy.",
        ]
    )


def _table(r: random.Random) -> str:
    rows = [
        (name, r.choice(PLACES), r.randint(18, 80), r.choice(JOBS))
        for name in r.sample(NAMES, r.randint(4, 8))
    ]
    if r.random() < 0.5:
        lines = ["name,city,age,job", *(f"{n},{c},{a},{j}" for n, c, a, j in rows)]
    else:
        lines = ["| Name | City | Age | Job |", "|---|---|---|---|"]
        lines += [f"| {n} | {c} | {a} | {j} |" for n, c, a, j in rows]
    return "\n".join(lines)


def _arithmetic(r: random.Random) -> str:
    name, food = r.choice(NAMES), r.choice(FOODS)
    a, b, c = r.randint(2, 50), r.randint(2, 50), r.randint(2, 9)
    return (
        f"Question: {name} has {a} bags of {food} and buys {b} more. Each bag costs {c} coins. "
        f"How much did all of it cost?\n"
        f"Answer: First add the bags: {a} + {b} = {a + b}. Then multiply by the price: "
        f"{a + b} * {c} = {(a + b) * c}. So the answer is {(a + b) * c} coins."
    )


def _python_code(r: random.Random) -> str:
    verb, noun, other = r.choice(VERBS), r.choice(NOUNS), r.choice(NOUNS)
    limit = r.randint(2, 100)
    body = r.choice(
        [
            (
                f"    result = []\n    for item in {noun}:\n        if item > {limit}:\n"
                f"            result.append(item)\n    return result\n"
            ),
            (
                f"    total = 0\n    for index, item in enumerate({noun}):\n"
                f"        total += item * {limit}\n    return total / len({noun})\n"
            ),
            (
                f"    seen = set()\n    while {noun}:\n        item = {noun}.pop()\n"
                f"        if item not in seen:\n            seen.add(item)\n    return sorted(seen)\n"
            ),
            (
                f'    if not {noun}:\n        raise ValueError("no {noun} to {verb}")\n'
                f"    return {{key: len(key) for key in {noun}}}\n"
            ),
        ]
    )
    return (
        f"{r.choice(['import math', 'import json', 'import os'])}\n\n\n"
        f'def {verb}_{noun}({noun}, {other}=None):\n    """{verb.title()} the {noun} and return '
        f'the {other}."""\n{body}\n\nprint({verb}_{noun}([{r.randint(2, 99)}, '
        f"{r.randint(2, 99)}, {r.randint(2, 99)}]))"
    )


def _json_record(r: random.Random) -> str:
    record = {
        "id": r.randint(100, 9999),
        "device": r.choice(DEVICES),
        "place": r.choice(PLACES),
        "active": r.random() < 0.5,
        "values": [r.randint(2, 99) for _ in range(r.randint(3, 6))],
        "owner": {"name": r.choice(NAMES), "job": r.choice(JOBS)},
    }
    return json.dumps(record, indent=2)


def _letter(r: random.Random) -> str:
    sender, receiver = r.sample(NAMES, 2)
    return (
        f"Dear {receiver},\n\nThank you for the {r.choice(COLOURS)} {r.choice(THINGS)} that you "
        f"sent me from {r.choice(PLACES)}. We have had {r.choice(WEATHER)} here since "
        f"{r.choice(DAYS)}, and I spent most of my time in {r.choice(SETTINGS)}. Could you please "
        f"tell me when the {r.choice(DEVICES)} will be ready? The {r.choice(JOBS)} asked for "
        f"{r.randint(2, 40)} of them before {r.choice(MONTHS)}.\n\nI hope to see you soon.\n\n"
        f"With best wishes,\n{sender}"
    )


def _dialogue(r: random.Random) -> str:
    a, b = r.sample(NAMES, 2)
    thing = r.choice(THINGS)
    return "\n".join(
        [
            f"{a}: Did you see my {thing}? I left it near {r.choice(SETTINGS)}.",
            f"{b}: No, but the {r.choice(JOBS)} has a {r.choice(COLOURS)} one.",
            (
                f"{a}: That one costs {r.randint(20, 900)} coins, and I have to go to "
                f"{r.choice(PLACES)} on {r.choice(DAYS)}."
            ),
            f"{b}: Then ask {r.choice(NAMES)}. They know everything about {r.choice(SUBJECTS)}.",
            f"{a}: Good idea. What should I bring?",
            f"{b}: Some {r.choice(FOODS)}, and maybe a {r.choice(ANIMALS)}.",
            f"{a}: You are joking, but I will try it.",
        ]
    )


def _foreign(r: random.Random) -> str:
    name, place, number = r.choice(NAMES), r.choice(PLACES), r.randint(2, 90)
    return r.choice(
        [
            (
                f"Me llamo {name} y vivo en {place} desde hace {number} años. Mañana iré al mercado "
                f"para comprar pan, queso y {number} naranjas. Después hablaré con mi familia."
            ),
            (
                f"Je m'appelle {name} et j'habite à {place} depuis {number} ans. Demain, je vais au "
                f"marché pour acheter du pain, du fromage et {number} pommes. Ensuite, j'écrirai."
            ),
            (
                f"Ich heiße {name} und wohne seit {number} Jahren in {place}. Morgen gehe ich auf den "
                f"Markt, um Brot, Käse und {number} Äpfel zu kaufen. Danach schreibe ich einen Brief."
            ),
        ]
    )


MAKERS = (
    (_story, ("Tell me a story.", "Write a short story about a journey.", "Write a story.")),
    (_biography, ("Write about the life of a person.", "Who was this person?")),
    (_explanation, ("Explain how it works.", "Explain this in detail, step by step.", "Why?")),
    (_numbered_list, ("Write a list.", "Make a list of things that I need.")),
    (_recipe, ("Give me a recipe.", "How do I cook dinner?", "Describe a recipe step by step.")),
    (_table, ("Make a table of people.", "Continue the table.")),
    (_arithmetic, ("Solve a problem in steps.", "How much is it?")),
    (_python_code, ("Write a Python function.", "Write code that works.")),
    (_json_record, ("Write a JSON record.", "Describe the device in JSON.")),
    (_letter, ("Write a letter to a friend.", "Write an email.")),
    (_dialogue, ("Write a dialogue between two friends.", "Write a conversation.")),
    (_foreign, ("Translate this.", "Write a short text in another language.")),
)


def _stdlib_docstrings() -> Iterator[str]:
    """Docstrings of a fixed list of standard library modules, in a fixed order."""
    for module_name in STDLIB_MODULES:
        try:
            module = importlib.import_module(module_name)
        except ImportError:
            continue  # some builds of Python leave out sqlite3 and the like
        for name in ["", *sorted(vars(module))]:
            thing = vars(module)[name] if name else module
            if name.startswith("_") or (name and not callable(thing)):
                continue
            doc = inspect.getdoc(thing)
            if doc and len(doc) > 120:
                yield f"{module_name}{'.' if name else ''}{name}\n{doc[:1500]}"


@functools.lru_cache(maxsize=1)
def build_corpus() -> tuple[Document, ...]:
    """The training documents in a fixed order: plain strings and chat conversations."""
    r = random.Random(CORPUS_SEED)
    documents: list[Document] = []
    for maker, requests in MAKERS:
        for index in range(DOCUMENTS_PER_KIND):
            text = maker(r)
            if index % 3 == 0:
                subject = r.choice(SUBJECTS)
                question = r.choice(requests)
                if r.random() < 0.7:
                    question = f"{question} It is about {subject}."
                messages = [{"role": "user", "content": question}]
                if r.random() < 0.2:
                    system = f"You are a helpful {r.choice(JOBS)}."
                    messages.insert(0, {"role": "system", "content": system})
                documents.append([*messages, {"role": "assistant", "content": text}])
            elif index % 3 == 1:
                # Two texts in one document teach the model to go on to something new.
                documents.append(f"{text}\n\n{r.choice(MAKERS)[0](r)}")
            else:
                documents.append(text)
    documents.extend(dict.fromkeys(_stdlib_docstrings()))  # aliases share a docstring
    r.shuffle(documents)
    return tuple(documents)


def _corpus_lines() -> Iterator[str]:
    """The corpus as lines of plain text, which is what the tokenizers are trained on."""
    for document in build_corpus():
        texts = [document] if isinstance(document, str) else [m["content"] for m in document]
        for text in texts:
            yield from (line for line in text.split("\n") if line.strip())


@dataclass(frozen=True)
class SpecialIds:
    """Token ids that the model's config has to name."""

    bos: int
    eos: int
    stop: list[int]
    pad: int | None
    document_end: int


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _save_sentencepiece(folder: Path) -> SpecialIds:
    """Train a Llama-2 style SentencePiece model and write the files a Llama-2 folder holds."""
    import sentencepiece
    from tokenizers import Tokenizer, decoders, normalizers, processors
    from tokenizers.models import BPE

    # A writer instead of a model_prefix: the prefix, a path, would be stored inside the model.
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=_corpus_lines(),
        model_writer=written,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        character_coverage=0.9999,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        normalization_rule_name="identity",
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,  # more threads may count pairs in another order
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(written.getvalue())

    sp = sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())
    pieces = [sp.id_to_piece(i) for i in range(sp.get_piece_size())]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in pieces
        for cut in range(1, len(piece))
        if not sp.is_byte(vocab[piece]) and not sp.is_control(vocab[piece])
        if not sp.is_unknown(vocab[piece])
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
    # The same pipeline as in the tokenizer.json of Llama-2: the dummy prefix and the space mark
    # come from the normalizer, so that the file alone agrees with the SentencePiece library.
    fast = Tokenizer(BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    fast.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    fast.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    fast.add_special_tokens(["<unk>", "<s>", "</s>"])
    fast.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    fast.save(str(folder / "tokenizer.json"))

    def added(content: str) -> dict[str, Any]:
        return {
            "content": content,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
        }

    specials = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    _write_json(
        folder / "special_tokens_map.json", {name: added(text) for name, text in specials.items()}
    )
    _write_json(
        folder / "tokenizer_config.json",
        {
            "add_bos_token": True,
            "add_eos_token": False,
            "added_tokens_decoder": {
                str(i): {**added(text), "special": True}
                for i, text in enumerate(["<unk>", "<s>", "</s>"])
            },
            **specials,
            "chat_template": LLAMA_CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "legacy": False,
            "model_max_length": CONTEXT,
            "pad_token": None,
            "sp_model_kwargs": {},
            "tokenizer_class": "LlamaTokenizer",
        },
    )
    return SpecialIds(bos=1, eos=2, stop=[2], pad=None, document_end=2)


def _save_bpe(folder: Path) -> SpecialIds:
    """Train a GPT-2 style byte-level BPE with ChatML tokens and write its files."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
    from tokenizers.models import BPE
    from tokenizers.trainers import BpeTrainer

    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    bpe = Tokenizer(BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.ByteLevel(trim_offsets=False)
    bpe.train_from_iterator(
        (line + "\n" for line in _corpus_lines()),
        BpeTrainer(
            vocab_size=VOCAB_SIZE - len(specials),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    # Added after training, so that they take the last ids as they do in real ChatML models.
    bpe.add_special_tokens(specials)
    bpe.save(str(folder / "tokenizer.json"))
    ids = {text: bpe.get_vocab(with_added_tokens=True)[text] for text in specials}
    _write_json(
        folder / "tokenizer_config.json",
        {
            "added_tokens_decoder": {
                str(ids[text]): {
                    "content": text,
                    "lstrip": False,
                    "normalized": False,
                    "rstrip": False,
                    "single_word": False,
                    "special": True,
                }
                for text in specials
            },
            "bos_token": None,
            "chat_template": CHATML_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|im_end|>",
            "model_max_length": CONTEXT,
            "pad_token": "<|endoftext|>",
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": None,
        },
    )
    end_of_text, im_end = ids["<|endoftext|>"], ids["<|im_end|>"]
    return SpecialIds(
        bos=end_of_text,
        eos=im_end,
        stop=[im_end, end_of_text],
        pad=end_of_text,
        document_end=end_of_text,
    )


def _training_tokens(
    tokenizer: Any, special: SpecialIds, r: random.Random, wanted: int
) -> torch.Tensor:
    """Shuffled documents as one stream of ids, shape (sequences, SEQUENCE + 1).

    Stops once `wanted` sequences are there; holds fewer when the corpus is shorter than that.
    """
    documents = list(build_corpus())
    r.shuffle(documents)
    stream: list[int] = []
    tokenizer.model_max_length = sys.maxsize  # no warning: the stream is cut up afterwards
    for document in documents:
        if isinstance(document, str):
            stream += tokenizer(document)["input_ids"]
            stream.append(special.document_end)
        else:
            text = tokenizer.apply_chat_template(document, tokenize=False)
            stream += tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(stream) >= wanted * (SEQUENCE + 1):
            break
    count = len(stream) // (SEQUENCE + 1)
    return torch.tensor(stream[: count * (SEQUENCE + 1)]).view(count, SEQUENCE + 1)


def _build_model(
    special: SpecialIds,
    *,
    tied: bool,
    layers: int,
    attention_bias: bool,
    arch: str,
    rope_scaling: str | None,
) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
    if rope_scaling == "llama3":
        rope = {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": CONTEXT // 4,
        }
    common: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": FFN_SIZE,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "rope_parameters": rope,
        "tie_word_embeddings": tied,
        "bos_token_id": special.bos,
        "eos_token_id": special.eos,
        "pad_token_id": special.pad,
        "attn_implementation": "sdpa",
    }
    model: Any
    if arch == "mistral":
        model = MistralForCausalLM(MistralConfig(sliding_window=None, **common))
    else:
        model = LlamaForCausalLM(LlamaConfig(attention_bias=attention_bias, **common))
    model.generation_config.bos_token_id = special.bos
    model.generation_config.eos_token_id = special.stop if len(special.stop) > 1 else special.eos
    model.generation_config.pad_token_id = special.pad
    return model


def _train(
    model: Any, sequences: torch.Tensor, steps: int, generator: torch.Generator, verbose: bool
) -> None:
    """AdamW with a short warm-up and a cosine decay; prints the loss in nats per token."""
    decay = [p for p in model.parameters() if p.ndim > 1]
    no_decay = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": no_decay, "weight_decay": 0.0}],
        lr=PEAK_LEARNING_RATE,
        betas=(0.9, 0.95),
    )
    warmup = max(1, steps // 20)
    order = torch.empty(0, dtype=torch.long)
    recent: list[float] = []
    started = time.monotonic()
    model.train()
    for step in range(steps):
        if len(order) < BATCH:
            order = torch.cat([order, torch.randperm(len(sequences), generator=generator)])
        batch, order = sequences[order[:BATCH]], order[BATCH:]
        progress = max(0.0, (step - warmup) / max(1, steps - warmup))
        scale = min(1.0, (step + 1) / warmup) * (0.55 + 0.45 * math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LEARNING_RATE * scale
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(
            logits.reshape(-1, VOCAB_SIZE), batch[:, 1:].reshape(-1)
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        recent.append(float(loss.detach()))
        if verbose and ((step + 1) % 50 == 0 or step + 1 == steps):
            mean = sum(recent) / len(recent)
            seconds = time.monotonic() - started
            print(f"step {step + 1}/{steps}  loss {mean:.3f}  {seconds:.0f} s", file=sys.stderr)
            recent.clear()
    model.eval()


def _split_weights(folder: Path, shards: int) -> None:
    """Replace model.safetensors by `shards` files of about equal bytes and their index."""
    from safetensors.torch import load_file, save_file

    single = folder / "model.safetensors"
    tensors = load_file(single)
    # save_pretrained's own splitting takes a size and gives no say over the number of files.
    names = list(tensors)
    left = sum(tensors[name].nbytes for name in names)
    total = left
    groups: list[list[str]] = [[]]
    size = 0
    for position, name in enumerate(names):
        open_shards = shards - len(groups)
        full = groups[-1] and size >= left / (open_shards + 1)
        if open_shards and (full or len(names) - position == open_shards):
            left -= size
            size = 0
            groups.append([])
        groups[-1].append(name)
        size += tensors[name].nbytes
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, start=1):
        file_name = f"model-{number:05d}-of-{shards:05d}.safetensors"
        save_file({n: tensors[n] for n in group}, folder / file_name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(group, file_name))
    single.unlink()
    _write_json(
        folder / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))},
    )


def _check(
    out: Path,
    tokenizer: str,
    steps: int,
    shards: int,
    layers: int,
    attention_bias: bool,
    arch: str,
    rope_scaling: str | None,
) -> None:
    """Raise TinyLlamaError for anything that would only fail after the training."""
    if out.exists() or out.is_symlink():
        raise TinyLlamaError(f"{out} exists already; name a new folder or remove that one")
    for label, value, allowed in (
        ("tokenizer", tokenizer, TOKENIZERS),
        ("arch", arch, ARCHITECTURES),
        ("rope scaling", rope_scaling or "none", ROPE_SCALINGS),
    ):
        if value not in allowed:
            raise TinyLlamaError(f"{label} must be one of {', '.join(allowed)}, not {value!r}")
    for label, number, least in (("steps", steps, 0), ("shards", shards, 1), ("layers", layers, 1)):
        if number < least:
            raise TinyLlamaError(f"{label} must be at least {least}, not {number}")
    if shards > 1 + 9 * layers:
        raise TinyLlamaError(f"{shards} shards are too many for a model of {layers} layers")
    if arch == "mistral" and attention_bias:
        raise TinyLlamaError("Mistral has no attention biases; use arch llama with attention bias")


def make_tiny_llama(
    out_dir: str | os.PathLike[str],
    *,
    tokenizer: str = "sentencepiece",
    steps: int = DEFAULT_STEPS,
    seed: int = 0,
    tied: bool = False,
    shards: int = 1,
    layers: int = 3,
    attention_bias: bool = False,
    arch: str = "llama",
    rope_scaling: str | None = None,
    verbose: bool = False,
) -> Path:
    """Train a tiny model and write it to `out_dir` as a Hugging Face folder.

    Args:
        out_dir: the folder to make; it must not exist, its parent is made when missing.
        tokenizer: "sentencepiece" (Llama-2 style) or "bpe" (byte-level, ChatML).
        steps: optimiser steps of 16 x 128 tokens each; 0 saves the untrained model.
        seed: for the initial weights and the order of the training text.
        tied: whether the output layer shares the embedding matrix.
        shards: number of safetensors files.
        layers: number of transformer blocks.
        attention_bias: biases on the q, k, v and o projections (llama only).
        arch: "llama" or "mistral".
        rope_scaling: None or "none", or "llama3" (factor 4 over 128 positions).
        verbose: print the training loss to stderr.

    Returns:
        The path of the finished folder.

    Raises:
        TinyLlamaError: the folder exists, or the options do not go together.
    """
    from transformers import AutoTokenizer

    out = Path(out_dir)
    _check(out, tokenizer, steps, shards, layers, attention_bias, arch, rope_scaling)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    was_warning = torch.is_deterministic_algorithms_warn_only_enabled()
    # Callers are tests with random numbers of their own: leave the global generator as it was.
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            torch.use_deterministic_algorithms(True, warn_only=True)
            save = _save_sentencepiece if tokenizer == "sentencepiece" else _save_bpe
            special = save(partial)
            model = _build_model(
                special,
                tied=tied,
                layers=layers,
                attention_bias=attention_bias,
                arch=arch,
                rope_scaling=rope_scaling,
            )
            if steps:
                sequences = _training_tokens(
                    AutoTokenizer.from_pretrained(partial),
                    special,
                    random.Random(seed),
                    max(BATCH, steps * BATCH),
                )
                generator = torch.Generator().manual_seed(seed)
                _train(model, sequences, steps, generator, verbose)
        model.save_pretrained(partial)
        if shards > 1:
            _split_weights(partial, shards)
        partial.rename(out)
    finally:
        torch.use_deterministic_algorithms(was_deterministic, warn_only=was_warning)
        shutil.rmtree(partial, ignore_errors=True)
    return out


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description="Make a tiny, really trained Llama checkpoint folder for tests."
    )
    parser.add_argument("out_dir", type=Path, help="folder to make; it must not exist")
    parser.add_argument("--tokenizer", choices=TOKENIZERS, default="sentencepiece")
    parser.add_argument(
        "--steps", type=int, default=DEFAULT_STEPS, help="training steps (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0)
    tying = parser.add_mutually_exclusive_group()
    tying.add_argument("--tied", dest="tied", action="store_true", help="share the embeddings")
    tying.add_argument("--untied", dest="tied", action="store_false", help="the default")
    parser.set_defaults(tied=False)
    parser.add_argument("--shards", type=int, default=1, help="number of safetensors files")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--attention-bias", action="store_true")
    parser.add_argument("--arch", choices=ARCHITECTURES, default="llama")
    parser.add_argument("--rope-scaling", choices=ROPE_SCALINGS, default="none")
    options = parser.parse_args(argv)
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        folder = make_tiny_llama(verbose=True, **vars(options))
    except TinyLlamaError as error:
        print(f"make_tiny_llama: {error}", file=sys.stderr)
        return 1
    print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
