"""The small F16 model: the same bytes everywhere, nothing between a machine and itself, and a KL
far above the threshold as soon as any of its matrices is wrong."""

import hashlib

import gguf
import numpy as np
import pytest
from fixtures.tiny_bundle import THRESHOLDS

from edge_dtm.formats.record import RunSettings
from edge_dtm.llamacpp import probe_model
from edge_dtm.llamacpp.gguf_header import check_gguf

SETTINGS = RunSettings(threads=1)
# Host and device agree on the model because both make these numbers. Where this test fails numpy's
# stream has changed, and every bundle's probe.npz would call a healthy device broken: do not put
# in the new constant, but draw the weights in a way that gives the old one.
TENSORS_SHA256 = "91a7dc06b659c8b37b72d9c096763fc189331c54a48cc4fe692be7b95defebef"
TOKENS_SHA256 = "e7eddcefbff2de23bda804c091bf8b472e1b206e676982da9d0324cda56a3fa1"
MATRICES = [name for name, shape in probe_model.SHAPE.tensors().items() if len(shape) == 2][1:]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    return probe_model.record(tmp_path_factory.mktemp("probe") / "probe.gguf", SETTINGS)


@pytest.fixture
def kl_of_changed(recorded, tmp_path, monkeypatch):
    """The KL of a model with change(weights (rows, columns) of F16) in place of one matrix."""
    write = probe_model.write

    def kl(name, change):
        def write_changed(path):
            write(path)
            tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == f"{name}.weight")
            weights, offset = np.array(tensor.data), int(tensor.data_offset)
            spoilt = change(weights.copy())
            assert spoilt.dtype == np.float16 and (spoilt != weights).any()
            with path.open("r+b") as file:
                file.seek(offset)
                file.write(spoilt.tobytes())

        monkeypatch.setattr(probe_model, "write", write_changed)
        return probe_model.kl(recorded, tmp_path / "p.gguf", SETTINGS)

    return kl


# --- the file -------------------------------------------------------------------------------


def test_the_weights_are_those_that_every_machine_makes(tmp_path):
    path = tmp_path / "probe.gguf"
    probe_model.write(path)
    check_gguf(path)
    assert path.stat().st_size < 1_000_000
    digest = hashlib.sha256()
    # Not of the whole file: its head is the gguf package's affair and changes no logit.
    for tensor in sorted(gguf.GGUFReader(path).tensors, key=lambda t: t.name):
        digest.update(tensor.name.encode())
        digest.update(tensor.data.tobytes())
    assert digest.hexdigest() == TENSORS_SHA256


def test_the_tokens_are_those_that_every_machine_feeds():
    fed = probe_model.sequences()
    digest = hashlib.sha256(fed.prompt_ids.astype("<i4").tobytes())
    digest.update(fed.generated_ids.astype("<i4").tobytes())
    assert digest.hexdigest() == TOKENS_SHA256
    ids = np.concatenate([fed.prompt_ids, fed.generated_ids], axis=1)
    assert ids.min() >= 0 and ids.max() < probe_model.SHAPE.vocab
    assert len({tuple(row) for row in ids}) == len(fed) == probe_model.SEQUENCES


def test_the_weights_are_of_the_size_of_a_real_models(tmp_path):
    """Rows of about unit length: activations neither vanish nor overflow F16."""
    path = tmp_path / "probe.gguf"
    probe_model.write(path)
    for tensor in gguf.GGUFReader(path).tensors:
        if tensor.tensor_type == gguf.GGMLQuantizationType.F16:
            norms = np.linalg.norm(tensor.data.astype(np.float64), axis=1)
            assert 0.9 < norms.mean() < 1.1
            assert abs(tensor.data.astype(np.float64).mean()) < 0.01


# --- what it says ---------------------------------------------------------------------------


def test_a_machine_does_not_differ_from_itself(recorded, tmp_path):
    assert probe_model.kl(recorded, tmp_path / "probe.gguf", SETTINGS) < 1e-9


def test_the_record_says_something(recorded):
    """A model that answers the same to all, or anything to all, would find no fault."""
    assert recorded.ids.shape == (probe_model.SEQUENCES, probe_model.TOKENS)
    assert len(np.unique(recorded.ids)) > 20
    margins = recorded.top_logits[..., 0] - recorded.top_logits[..., 1]
    assert np.median(margins) > 0.1 and np.isfinite(recorded.top_logits).all()


@pytest.mark.parametrize(
    "settings",
    [
        RunSettings(threads=2),
        RunSettings(threads=1, parallel_sequences=1),
        RunSettings(threads=1, batch_tokens=7),
        RunSettings(threads=1, repack=False),
    ],
    ids=["threads", "one by one", "small batches", "not repacked"],
)
def test_how_a_healthy_machine_is_run_stays_far_below_the_threshold(recorded, tmp_path, settings):
    assert probe_model.kl(recorded, tmp_path / "p.gguf", settings) < THRESHOLDS.max_kl_probe / 10


@pytest.mark.parametrize("name", MATRICES)
def test_two_rows_in_each_others_place_are_found_in_every_matrix(kl_of_changed, name):
    def swap(weights):
        weights[[0, 1]] = weights[[1, 0]]
        return weights

    assert kl_of_changed(name, swap) > THRESHOLDS.max_kl_probe


@pytest.mark.parametrize("name", MATRICES)
def test_a_rounding_error_in_every_weight_of_a_matrix_is_none(kl_of_changed, name):
    """The last bit of F16: more than a healthy kernel's other order of summation does."""

    def round_up(weights):
        return np.nextafter(weights, np.float16(np.inf))

    assert 0 < kl_of_changed(name, round_up) < THRESHOLDS.max_kl_probe / 10
