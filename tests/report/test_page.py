"""The HTML page: what it says, that nothing of a bundle becomes an element of it, and how it looks
in Chromium on a phone."""

from __future__ import annotations

import dataclasses
import hashlib
import html
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_runner import assert_error, run
from fixtures import made_up

from edge_dtm.formats.archive import open_bundle, pack
from edge_dtm.formats.record import Record
from edge_dtm.formats.reference import Reference
from edge_dtm.llamacpp.vocabulary import LlamaVocab
from edge_dtm.report.gather import gather
from edge_dtm.report.page import page

HOSTILE = "</div><script>alert(1)</script><img src=//x.example onerror=alert(2)>&amp;\u202e\x00"
NORMAL_IDS = range(3 + 256, 3 + 256 + 26)  # of the tiny vocabulary, "▁a" to "▁z"


class Parsed(HTMLParser):
    """Elements with their attributes, and the texts between."""

    def __init__(self, document: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(document)
        self.close()

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((name, dict(attributes)))
        if name not in ("meta", "br", "wbr"):
            self.open.append(name)

    def handle_endtag(self, name: str) -> None:
        assert self.open.pop() == name

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def of_class(self, name: str) -> list[dict[str, str | None]]:
        return [a for _, a in self.elements if name in (a.get("class") or "").split()]


@pytest.fixture(scope="module")
def _full(
    _tiny_bundle: Path, tiny_gguf: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Reference]:
    random = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("full") / "full"
    with LlamaVocab(tiny_gguf) as vocabulary:
        texts = [f"prompt {i}" for i in range(made_up.SEQUENCES - 1)]
        texts.append(HOSTILE.replace("\x00", ""))
        reference = made_up.reference_of(
            texts,
            vocabulary.encode,
            lambda row: random.choice(NORMAL_IDS, made_up.TOKENS - row % 3).tolist(),
            random,
            NORMAL_IDS,
        )
    made_up.write_full_bundle(folder, tiny_gguf, _tiny_bundle / "probe.npz", reference)
    return folder, reference


@pytest.fixture
def full(_full: tuple[Path, Reference], tmp_path: Path) -> Path:
    """A bundle of 30 layers with everything in it."""
    return Path(shutil.copytree(_full[0], tmp_path / "full"))


@pytest.fixture
def reference(_full: tuple[Path, Reference]) -> Reference:
    return _full[1]


def _write(path: Path, data: Any) -> Path:
    path.write_text(json.dumps(data))
    return path


def _verdict_of(bundle: Path, reference: Reference, **changes: Any) -> dict[str, Any]:
    digest = hashlib.sha256((bundle / "manifest.json").read_bytes()).hexdigest()
    lists = made_up.curve(reference, Record.load(bundle / "host.npz"))
    n = len(reference)
    counts = {"sequences": n, "sequences_in_bundle": n}
    return made_up.verdict(bundle={"manifest_sha256": digest}, **{**counts, **lists, **changes})


def _page(bundle: Path, *files: Any) -> Parsed:
    with open_bundle(bundle) as opened:
        return Parsed(page(gather(opened, *files)))


def test_a_bundle_with_hardly_anything_in_it(tiny_bundle: Path) -> None:
    packed = tiny_bundle.with_name("small.edge")
    pack(tiny_bundle, packed)
    for bundle, name in ((tiny_bundle, "tiny-bundle"), (packed, "small")):
        result = run("report", bundle)
        assert result.exit_code == 0, result.output
        parsed = Parsed(bundle.with_name(f"{name}-report.html").read_text())
        assert parsed.open == []
        assert "Not yet verified on a device" in parsed.text
        assert "Without a curve: the noise floor" in parsed.text
        assert "Size against divergence" not in parsed.text
        assert "What that costs" not in parsed.text


def test_the_page_does_not_go_into_the_bundle(tiny_bundle: Path, tmp_path: Path) -> None:
    assert_error(run("report", tiny_bundle, "-o", tiny_bundle / "page.html"), "not as it was made")
    assert_error(
        run("report", tiny_bundle, "-o", tmp_path / "none" / "r.html"), "cannot be written"
    )
    (tiny_bundle / "host.npz").write_bytes(b"x")
    assert_error(run("report", tiny_bundle), "host.npz is changed")


def test_everything(full: Path, reference: Reference, tmp_path: Path) -> None:
    good = _write(tmp_path / "pi5.json", _verdict_of(full, reference))
    words = {"code": "broken_kernels", "words": "Broken kernels: <b>rebuild</b>."}
    changes = {"passed": False, "diagnosis": words, "notes": ["only a part"]}
    bad = _write(tmp_path / "rk.json", _verdict_of(full, reference, **changes))
    other = made_up.answers(reference, np.random.default_rng(5), 0.1)
    measured = made_up.measured_json(reference, other, "Q4_K_M.gguf", 105_500_000)
    preset = _write(tmp_path / "q.json", measured)
    out = tmp_path / "page.html"
    result = run("report", full, "-o", out, "--verdict", good, "--verdict", bad, "--with", preset)
    assert result.exit_code == 0, result.output
    parsed = Parsed(out.read_text())
    assert parsed.open == []
    for expected in (
        "SmolLM2-135M-Instruct for raspberrypi-5",
        "Passed on 1 of 2 devices.",
        "pi5 (aarch64, 4 CPUs)",
        "Broken kernels: <b>rebuild</b>.",
        "Note: only a part.",
        "Q4_K_M.gguf: 105.5 MB",
        "noise floor",
        "Q8_0+50.0% zeros",
        "210.0",
        "SHA-256",
    ):
        assert expected in parsed.text, expected
    assert parsed.text.index("Passed") < parsed.text.index("SDT is the share")
    assert len(parsed.of_class("pass")) == len(parsed.of_class("fail")) == 1
    # Curves of the host, two devices, the preset and the floor; in the other chart the frontier,
    # the floor and two intervals.
    assert len(parsed.of_class("line")) == 5 + 4
    assert len(parsed.of_class("c")) == 2 * (made_up.LAYERS * 7 + 1)
    assert len(parsed.of_class("example")) == 3
    _nothing_from_outside(out.read_text())


def _nothing_from_outside(document: str) -> None:
    parsed = Parsed(document)
    names = {name for name, _ in parsed.elements}
    assert not names & {"script", "img", "link", "iframe", "object", "base", "image", "a", "form"}
    for _, attributes in parsed.elements:
        for key, value in attributes.items():
            assert not key.startswith("on"), key
            assert key not in ("src", "href", "srcset", "action", "data", "xlink:href"), key
            assert "url(" not in (value or "")
    style = document[document.index("<style>") : document.index("</style>")]
    assert not re.search(r"url\(|@import|https?:|//", style)
    policy = next(a["content"] for n, a in parsed.elements if "http-equiv" in a)
    assert policy is not None and "default-src 'none'" in policy and "script-src" not in policy


def test_hostile_texts_stay_texts(
    tiny_bundle: Path, seal: Callable[..., None], tmp_path: Path
) -> None:
    loaded = Reference.load(tiny_bundle / "reference.npz")
    texts = np.array([HOSTILE.replace("\x00", "")] * len(loaded))
    dataclasses.replace(loaded, texts=texts).save(tiny_bundle / "reference.npz")
    seal(tiny_bundle, measured={"noise_floor": {HOSTILE: HOSTILE, "sdt": "x"}, "f16_bytes": "y"})
    manifest = json.loads((tiny_bundle / "manifest.json").read_text())
    manifest["provenance"] = {"model": HOSTILE, "profile": HOSTILE, HOSTILE: [{HOSTILE: HOSTILE}]}
    _write(tiny_bundle / "manifest.json", manifest)
    digest = hashlib.sha256((tiny_bundle / "manifest.json").read_bytes()).hexdigest()
    verdict = made_up.verdict(
        bundle={"manifest_sha256": digest, "name": HOSTILE},
        reasons=[HOSTILE],
        notes=[HOSTILE],
        diagnosis={"words": HOSTILE},
        runtime={"machine": HOSTILE, "system_info": HOSTILE, "llama_cpp_python": HOSTILE},
        settings={"threads": HOSTILE},
        first_divergent_tokens=[1, 2, 3],
        lengths=[4, 4, 4],
        passed=False,
    )
    out = tmp_path / "page.html"
    result = run(
        "report", tiny_bundle, "-o", out, "--verdict", _write(tmp_path / "v.json", verdict)
    )
    assert result.exit_code == 0, result.output
    document = out.read_text()
    _nothing_from_outside(document)
    assert "\u202e" not in document
    assert Parsed(document).text.count("<script>alert(1)</script>") > 10


@pytest.mark.parametrize(
    ("plan", "named"),
    [
        ({}, "schema version"),
        ({"frontier": [{"size_bytes": "1", "sigma": 1, "sdt": True, "fdt": 1}]}, "size_bytes"),
        ({"costs": [{"name": "a", "costs": {"Q8_0": "x"}}]}, "Q8_0"),
    ],
    ids=str,
)
def test_odd_plans(tiny_bundle: Path, seal: Callable[..., None], plan: Any, named: str) -> None:
    _write(tiny_bundle / "plan.json", plan)
    seal(tiny_bundle)
    assert_error(run("report", tiny_bundle), named)


def test_files_of_other_bundles(
    full: Path, tiny_bundle: Path, reference: Reference, tmp_path: Path
) -> None:
    verdict = _write(tmp_path / "v.json", _verdict_of(full, reference))
    far = _verdict_of(full, reference)
    far["lengths"][0] = 10**9
    far = _write(tmp_path / "far.json", far)
    host = full / "host.npz"
    measured = made_up.measured_json(reference, Record.load(host), "q", 1000)
    preset = _write(tmp_path / "q.json", measured)
    assert run("report", full, "--with", preset).exit_code == 0
    for bundle, option, file, words in (
        (tiny_bundle, "--verdict", verdict, "is a verdict of another bundle"),
        (full, "--verdict", far, "lengths are not those"),
        (tiny_bundle, "--with", preset, "was measured on other sequences"),
        (full, "--with", verdict, "v.json is wrong: name: is missing"),
        (tiny_bundle, "--record", host, "does not belong to this bundle"),
        (full, "--record", full / "reference.npz", "reference.npz"),
    ):
        assert_error(run("report", bundle, option, file), words)


def test_a_record_of_the_first_sequences(full: Path, tmp_path: Path) -> None:
    """As verify --max-sequences writes it."""
    host = Record.load(full / "host.npz")
    path = tmp_path / "part.npz"
    for rows, meta in (([7, 2, 11], {}), ([0, 1, 2], {"rows": [7, 2, 11]})):
        host.rows(np.array(rows)).save(path, meta)
        assert_error(run("report", full, "--record", path), "does not belong")
    host.rows(np.arange(5)).save(path, {"rows": list(range(5))})
    assert "Histogram over 5 sequences" in str(_page(full, [], [], path).elements)


def test_generated_text(full: Path, reference: Reference, tmp_path: Path) -> None:
    ids = reference.generated_ids.copy()
    ids[0, 10] = NORMAL_IDS[0] + (ids[0, 10] == NORMAL_IDS[0])
    path = tmp_path / "device.npz"
    host = Record.load(full / "host.npz")
    dataclasses.replace(host, mode="generate", ids=ids).save(path)
    shown = _page(full, [], [], path)
    assert "generated by itself" in shown.text
    assert "Tokens until the first other one" in shown.text
    assert "the first other token is number 11 of 48" in shown.text
    assert not shown.of_class("other")


def test_the_texts_are_those_of_the_tokens(
    full: Path, reference: Reference, tiny_gguf: Path
) -> None:
    with open_bundle(full) as opened:
        report = gather(opened)
    host = Record.load(full / "host.npz")
    with LlamaVocab(tiny_gguf) as vocabulary:
        for e in report.examples:
            own = reference.generated(e.row)
            there = [int(i) for i in host.ids[e.row, : len(own)]]
            assert "".join(e.original) == b"".join(map(vocabulary._piece, own)).decode()
            assert "".join(e.compressed) == b"".join(map(vocabulary._piece, there)).decode()
            assert e.different == [a != b for a, b in zip(own, there, strict=True)]
    titles = {e.title: e.first for e in report.examples}
    assert titles["Worst"] == report.shown.first.min()


# --- in a browser ---------------------------------------------------------------------------

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
# A frame of its own, whose width is the phone's: a window cannot be as narrow everywhere.
WRAPPER = """<!DOCTYPE html><body style="margin:0">
<iframe id="page" style="border:0;width:{width}px;height:3000px" srcdoc="{document}"></iframe>
<script>
const frame = document.getElementById("page");
frame.addEventListener("load", () => {{
  const inside = frame.contentDocument, root = inside.documentElement;
  const visible = inside.querySelector(".verdict").getBoundingClientRect();
  document.body.dataset.found = JSON.stringify({{
    width: root.clientWidth,
    scroll: root.scrollWidth,
    verdict_bottom: Math.round(visible.bottom),
    wide: [...inside.querySelectorAll("main *")].filter(
      e => !e.closest(".scroll, svg") && e.getBoundingClientRect().right > root.clientWidth + 1
    ).map(e => e.outerHTML.slice(0, 80)),
    smallest: Math.min(...[...inside.querySelectorAll("svg text")].map(
      e => e.getBoundingClientRect().height)),
    injected: inside.querySelectorAll("script, img").length,
  }});
}});
</script>
"""


def _chromium(profile: Path, url: str, *flags: str) -> subprocess.CompletedProcess[str]:
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    command += ["--disable-background-networking", f"--user-data-dir={profile}", *flags, url]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture
def shown_page(full: Path, reference: Reference, tmp_path: Path) -> Path:
    verdicts = []
    for name in ("pi5", "a-device-with-a-very-long-name-that-has-no-space-in-it-at-all-0123456789"):
        data = _verdict_of(full, reference, reasons=["wanted" * 40], passed=name == "pi5")
        verdicts += ["--verdict", _write(tmp_path / f"{name}.json", data)]
    out = tmp_path / "page.html"
    assert run("report", full, "-o", out, *verdicts).exit_code == 0
    return out


@pytest.mark.slow
@needs_chromium
@pytest.mark.parametrize("width", [360, 390, 1200])
def test_it_fits_the_screen(shown_page: Path, tmp_path: Path, width: int) -> None:
    wrapper = tmp_path / "wrapper.html"
    document = html.escape(shown_page.read_text(), quote=True)
    wrapper.write_text(WRAPPER.format(width=width, document=document))
    flags = ["--dump-dom", "--virtual-time-budget=5000", "--hide-scrollbars"]
    done = _chromium(tmp_path / "profile", wrapper.as_uri(), *flags)
    match = re.search(r'data-found="([^"]*)"', done.stdout)
    assert match, done.stderr[-2000:]
    layout = json.loads(html.unescape(match[1]))
    assert layout["width"] == width
    assert layout["scroll"] <= width
    assert layout["wide"] == []
    assert layout["injected"] == 0
    assert layout["verdict_bottom"] < 640, "the first verdict is seen without scrolling"
    assert layout["smallest"] >= 9, "figures are readable"
