"""Blocks one at a time against transformers' whole model, and sweeps that were cut."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from conftest import SEED, STARTS, Made
from hypothesis import given
from hypothesis import strategies as st

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.formats.reference import CALIBRATION, EXTRA, HELD_OUT, PACKAGED, Reference
from edge_dtm.host.blocks import statistics as statistics_module
from edge_dtm.host.blocks import sweeps
from edge_dtm.host.blocks.boundaries import Boundaries
from edge_dtm.host.blocks.gather import layer_components
from edge_dtm.host.blocks.statistics import SAMPLE_STEP, SITE_OF, Statistics, sampled_rows
from edge_dtm.host.blocks.text import MEASURED_DRAWS, Text
from edge_dtm.host.checkpoint import llama as llama_module
from edge_dtm.host.checkpoint.decoder import MATRICES, SITES
from edge_dtm.host.checkpoint.llama import Llama
from edge_dtm.host.checkpoint.model import module_name
from edge_dtm.host.checkpoint.open import open_checkpoint
from edge_dtm.host.trajectory.reference import COST_SEQUENCES, calibration_rows

Values = dict[str, torch.Tensor]
CPU = torch.device("cpu")
OUTPUTS = 5  # fitted sequences that count for the moments of the gradients


def _whole(m: Made) -> tuple[Values, list[Values]]:
    """transformers' model on each sequence alone: what its modules read and write, all tokens one
    after another, float64, and for each draw of signs the gradients there, from the logits back."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(m.checkpoint.path, dtype=torch.float32).eval()
    seen: Values = {}

    def keep(key: str, module: Any, args: Any, out: torch.Tensor | None = None) -> None:
        seen[key] = args[0] if out is None else out

    for number, layer in enumerate([*model.model.layers, model.model.norm]):
        layer.register_forward_pre_hook(partial(keep, f"hidden.{number}"))
    for name in (c.name for c in m.components if c.in_block):
        module = model.get_submodule(module_name(name))
        module.register_forward_hook(partial(keep, f"out.{name}"))
        if name.rpartition(".")[2] in SITES:
            module.register_forward_pre_hook(partial(keep, f"in.{name}"))
    values: dict[str, list[torch.Tensor]] = {}
    gradients: list[dict[str, list[torch.Tensor]]] = [{} for _ in range(MEASURED_DRAWS)]
    r = m.text.reference
    for i, sequence in enumerate(m.text.sequences):
        embedded = model.model.embed_tokens(torch.tensor([sequence])).detach().requires_grad_()
        logits = model(inputs_embeds=embedded, use_cache=False).logits
        count = int(r.generated_lengths[i])
        top = torch.from_numpy(r.top_ids[i, :count, :2].astype(np.int64))
        margins = logits[0, -count:].gather(1, top) @ torch.tensor([1.0, -1.0])
        for draw in range(MEASURED_DRAWS if i < m.text.measured else 1):
            signs = np.random.default_rng([SEED, draw, i]).choice([-1.0, 1.0], count)
            total = (margins * torch.from_numpy(signs).float()).sum()
            found = torch.autograd.grad(total, list(seen.values()), retain_graph=True)
            for key, gradient in zip(seen, found, strict=True):
                gradients[draw].setdefault(key, []).append(gradient[0].double())
        for key, value in {**seen, "logits": logits}.items():
            values.setdefault(key, []).append(value[0].detach().double())
    joined = [{k: torch.cat(v) for k, v in part.items()} for part in (values, *gradients)]
    return joined[0], joined[1:]


@pytest.fixture(scope="module")
def variant(
    made: Made,
    tied: Made,
    tiny_llamas: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], tuple[Made, Values, list[Values]]]:
    """A model and what transformers says of it."""

    def biased() -> Made:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        source, folder = tiny_llamas("bias_rope"), tmp_path_factory.mktemp("biased") / "hf"
        model = AutoModelForCausalLM.from_pretrained(source)
        generator = torch.Generator().manual_seed(0)
        for name, data in model.named_parameters():
            if name.endswith(".bias"):
                data.data = 0.3 * torch.randn(data.shape, generator=generator)
        AutoTokenizer.from_pretrained(source).save_pretrained(folder)
        model.save_pretrained(folder)
        return Made(folder, tmp_path_factory.mktemp("made-biased"))

    @cache
    def make(name: str) -> tuple[Made, Values, list[Values]]:
        m = {"made": lambda: made, "tied": lambda: tied, "bias_rope": biased}[name]()
        return m, *_whole(m)

    return make


def _close(found: Any, expected: torch.Tensor, share: float = 2e-4) -> None:
    """To a share of the largest value."""
    found = (torch.from_numpy(np.array(found)) if isinstance(found, np.ndarray) else found).double()
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= share * float(expected.abs().max())


VARIANTS = pytest.mark.parametrize("name", ["made", "tied", "bias_rope"])


@VARIANTS
def test_boundaries_and_logits_are_those_of_the_whole_model(variant: Any, name: str) -> None:
    m, values, gradients = variant(name)
    for number in range(m.config.layers + 1):
        _close(m.data.boundaries.rows("hidden", number), values[f"hidden.{number}"])
        rows = m.data.boundaries.rows("gradient", number)
        _close(rows[: m.text.tokens], gradients[0][f"hidden.{number}"])
        _close(rows[m.text.tokens :], gradients[1][f"hidden.{number}"])
    hidden = torch.cat(m.llama.final_hidden(m.text.sequences))
    _close(m.llama.logits(hidden), values["logits"])


@VARIANTS
def test_inputs_and_gradients_of_all_matrices(variant: Any, name: str) -> None:
    m, values, gradients = variant(name)
    tokens = m.text.measured_tokens
    for layer, found in m.statistics.items():
        block = f"blk.{layer}."
        for site in SITES:
            _close(found[f"inputs.{site}"], values[f"in.{block}{site}"][:tokens])
        for matrix in MATRICES:
            g = torch.stack([draw[f"out.{block}{matrix}"][:tokens] for draw in gradients])
            _close(found[f"gradients.{matrix}"], g)
            _close(found[f"sizes.{matrix}"], g.square().mean((0, 2)).sqrt())
            weights = torch.from_numpy(np.array(m.weights(block + matrix))).double()
            _close(found[f"back.{matrix}"], g @ weights)


@VARIANTS
def test_statistics_are_plain_sums(
    variant: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    m, values, gradients = variant(name)
    monkeypatch.setattr(statistics_module, "OUTPUT_SEQUENCES", OUTPUTS)
    start, near = m.text.measured_tokens, int(m.text.edges[m.text.measured + OUTPUTS])
    for layer in range(m.config.layers):
        gathering = statistics_module.Gathering(m.text, None)
        for piece in sweeps.back_through(m.llama, m.text, m.data.boundaries, layer, "fitted"):
            gathering.add(piece)
        found = gathering.finish()
        for site in SITES:
            x = values[f"in.blk.{layer}.{site}"]
            b = gradients[0][f"in.blk.{layer}.{site}"][start:]
            _close(found[f"squares.{site}"], x[start:].square().mean(0))
            _close(found[f"gradient_squares.{site}"], b.square().mean(0), 1e-3)
            sample = [
                x[m.text.places(batch)][::SAMPLE_STEP]
                for batch in m.text.batches
                if batch[0] >= m.text.measured
            ]
            _close(found[f"sample.{site}"], torch.cat(sample))
        for matrix in MATRICES:
            x = values[f"in.blk.{layer}.{SITE_OF[matrix]}"][start:]
            g = gradients[0][f"out.blk.{layer}.{matrix}"][start:]
            v, some = g.square().mean(1).sqrt(), g[: near - start]
            _close(found[f"token_weights.{matrix}"], v)
            _close(found[f"output_squares.{matrix}"], g.square().mean(0), 1e-3)
            _close(found[f"hessian.{matrix}"], (x.T * v) @ x / v.sum())
            heard = some[v[: len(some)] > 0]
            u = heard.square().mean(1).sqrt()
            _close(found[f"moments.{matrix}"], (heard.T / u) @ heard, 1e-3)
            for key, w in ((f"known.{matrix}", v), (f"output_known.{matrix}", u)):
                _close(found[key], w.sum() ** 2 / w.square().sum(), 1e-3)


def test_the_ends_of_the_model(variant: Any) -> None:
    """A looked-up row's error moves the margins by its gradient, the head's by what it reads, once
    for either row of a margin."""
    m, values, gradients = variant("made")
    start, r = m.text.measured_tokens, m.text.reference
    at = torch.from_numpy(m.text.margin_positions(m.text.measured, len(r)))
    g = gradients[0]["hidden.0"][start:]
    normed = values[f"hidden.{m.config.layers}"].float()
    h = m.llama.norm(normed).double()
    inputs = m.edge_inputs
    assert inputs.positions == len(at) == int(r.generated_lengths[m.text.measured :].sum())
    _close(inputs.looked_up, g.T @ g / len(at), 1e-3)
    _close(inputs.head, 2 * h[at].T @ h[at] / len(at))
    _close(inputs.embedded, torch.stack([d["hidden.0"][:start] for d in gradients]))
    _close(inputs.head_squares, h[start:].square().mean(0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits_are_taken_as_they_are(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """Exactly, whether blocks stay in memory or are read anew for each use."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(made.checkpoint.path, dtype=dtype)
    model.save_pretrained(tmp_path / "half")
    model.float().save_pretrained(tmp_path / "whole")
    half, whole = (open_checkpoint(tmp_path / n) for n in ("half", "whole"))
    assert half.torch_tensor("blk.0.attn_q.weight").dtype == dtype
    sequences = made.text.sequences[:3]
    expected = Llama(whole, CPU).final_hidden(sequences)
    logits = Llama(whole, CPU).logits(expected[0])
    for share in (1.0, 0.0):
        monkeypatch.setattr(llama_module, "KEPT_SHARE", share)
        monkeypatch.setattr(llama_module, "HEAD_ROWS", 100)
        ours = Llama(half, CPU)
        assert ours.block(1).tensors["ffn_up.weight"].dtype == torch.float32
        for a, b in zip(ours.final_hidden(sequences), expected, strict=True):
            assert torch.equal(a, b)
        _close(ours.logits(expected[0]), logits.double(), 1e-6)


# --- runs that were cut ---------------------------------------------------------------------


class _Stop(Exception):
    pass


def _run(m: Made, text: Text, folder: Path) -> dict[str, bytes]:
    """All boundaries and statistics on sampled rows, what is there not made again."""
    boundaries = Boundaries(folder, text.tokens, text.measured_tokens, m.config.hidden)
    jobs = dataclasses.replace(m.jobs, folder=folder)
    data = dataclasses.replace(m.data, boundaries=boundaries, jobs=jobs, text=text)
    data.prepare(m.config.layers - 1)
    for layer in reversed(range(m.config.layers)):
        if not jobs.measured_file(layer).is_file():
            own = layer_components(m.components, layer)
            data.gather(layer, {n: sampled_rows(c, 0.125, SEED) for n, c in own.items()})
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def test_killed_in_every_block_the_bytes_are_the_same(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = dataclasses.replace(made.text, batch_tokens=128)
    assert len(text.batches) > 4
    expected = _run(made, text, tmp_path / "whole")
    assert len(expected) == 4 * made.config.layers + 2
    runs, killed, real = 0, tmp_path / "killed", sweeps.run_block
    while runs < 20:
        left = len(text.batches) + 2  # so that a run ends in the block behind the first it makes

        def run_block(*args: Any, **named: Any) -> torch.Tensor:
            nonlocal left
            left -= 1
            if not left:
                raise _Stop
            return real(*args, **named)

        monkeypatch.setattr(sweeps, "run_block", run_block)
        runs += 1
        for path in killed.glob("*"):  # what SIGKILL leaves of a file
            path.with_suffix(".tmp").write_bytes(b"half")
        try:
            found = _run(made, text, killed)
        except _Stop:
            continue
        break
    assert runs == 2 * made.config.layers
    assert {n: found[n] for n in expected} == expected


@pytest.mark.parametrize("kind", ["hidden", "gradient", "statistics"])
def test_damaged_files_are_one_line(made: Made, tmp_path: Path, kind: Any) -> None:
    boundaries = Boundaries(tmp_path, 30, 10, 4)
    if kind == "statistics":
        path = tmp_path / "fitted-001.safetensors"
        Statistics({"squares.attn_q": torch.ones(4)}).save(path)
        read: Callable[[], Any] = lambda: Statistics.load(path)  # noqa: E731
    else:
        with boundaries.writing(kind, 1) as rows:
            rows[:] = 1
        path = boundaries.path(kind, 1)
        read = lambda: boundaries.rows(kind, 1)  # noqa: E731
    read()
    data = path.read_bytes()
    np.save(tmp_path / "other.npy", np.ones((3, 4), np.float32))
    other = (tmp_path / "other.npy").read_bytes()
    for bad in (data[:-1], data[: len(data) // 2], b"no array at all", b"", other, None):
        path.unlink() if bad is None else path.write_bytes(bad)
        with pytest.raises(EdgeDtmError, match=f"{path.name} cannot be read.*--no-resume") as found:
            read()
        assert "\n" not in str(found.value)


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before rows are written: a mapped file that finds no room ends the process."""

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    boundaries = Boundaries(tmp_path, 30, 10, 4)
    with (
        pytest.raises(EdgeDtmError, match="No space left on device.*free some space"),
        boundaries.writing("hidden", 0),
    ):
        pytest.fail("rows were asked for")
    assert not list(tmp_path.iterdir())


# --- which sequences and rows ---------------------------------------------------------------

_SPLITS = st.lists(
    st.sampled_from([CALIBRATION, HELD_OUT, EXTRA, PACKAGED]), min_size=1, max_size=160
)


@given(_SPLITS.filter(lambda split: CALIBRATION in split))
def test_what_is_fitted_to_is_not_measured(split: list[int]) -> None:
    reference = cast(Reference, SimpleNamespace(split=np.array(split, np.uint8)))
    measured, fitted = (set(rows.tolist()) for rows in calibration_rows(reference))
    own = {i for i, s in enumerate(split) if s == CALIBRATION}
    extra = {i for i, s in enumerate(split) if s == EXTRA}
    assert measured and fitted
    assert measured <= own and fitted <= own | extra
    assert measured | fitted == own | extra  # none is wasted
    assert len(measured) <= COST_SEQUENCES
    if len(own | extra) > 1:
        assert not measured & fitted
    else:
        assert measured == fitted == own


def test_text_keeps_every_token_once(made: Made) -> None:
    text = made.text
    assert text.measured == len(STARTS) and len(text.sequences) == 2 * len(STARTS)
    for batches, first, last in (
        ([b for b in text.batches if b[0] < text.measured], 0, text.measured_tokens),
        ([b for b in text.batches if b[0] >= text.measured], text.measured_tokens, text.tokens),
    ):
        places = torch.cat([text.places(b) for b in batches])
        assert sorted(places.tolist()) == list(range(first, last))
        for batch in batches:
            ids = text.ids(batch)[text.real(batch)].tolist()
            assert ids == [i for n in batch for i in text.sequences[n]]
