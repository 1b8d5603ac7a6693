"""The pipeline from checkpoint to bundle, stage by stage; each leaves a file to resume from."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from edge_dtm.core import strict_json
from edge_dtm.core.digest import digest_of
from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.core.machine import default_threads, room
from edge_dtm.core.metrics import (
    Divergence,
    compare,
    divergent_mask,
    first_divergent_tokens,
    perplexity,
)
from edge_dtm.core.progress import Stages
from edge_dtm.formats import bundle
from edge_dtm.formats.imatrix import check_imatrix, read_imatrix
from edge_dtm.formats.plan import (
    CANDIDATE_TYPES,
    SPARSE_LEVELS,
    SPARSE_TYPES,
    Plan,
    Treatment,
    candidate_treatments,
    distinct_texts,
    least_bytes_with_zeros,
)
from edge_dtm.formats.profile import DeviceProfile
from edge_dtm.formats.record import Record, RunSettings
from edge_dtm.formats.reference import (
    CALIBRATION,
    EXTRA,
    HELD_OUT,
    PACKAGED,
    Reference,
    load_imatrix,
    load_npz,
    save_npz,
)
from edge_dtm.formats.thresholds import healthy_range, thresholds_from
from edge_dtm.formats.transfer import packed_bytes
from edge_dtm.host import export
from edge_dtm.host.blocks.calibration import Calibration
from edge_dtm.host.blocks.sensitivity import Activations, fit_zeros, read_costs, sensitivity
from edge_dtm.host.blocks.shipped import Shipped
from edge_dtm.host.blocks.stage_pruning import fit_plan
from edge_dtm.host.bought import ROUNDS, in_words, weigh
from edge_dtm.host.checkpoint.checkpoint import Checkpoint, open_checkpoint
from edge_dtm.host.checkpoint.model import choose_device, load_model
from edge_dtm.host.checkpoint.tokenizer import NASTY_STRINGS, tokenization_mismatches
from edge_dtm.host.distill.distill import recovery_bytes
from edge_dtm.host.distill.retrain import RecoveredBlocks
from edge_dtm.host.distill.stage import recover_plan, sparsify
from edge_dtm.host.quantize.equalize import (
    EqualizedCheckpoint,
    Scales,
    find_scales,
    load_scales,
    logit_difference,
    save_scales,
    sites,
    top_logits,
)
from edge_dtm.host.quantize.masks import SCORES
from edge_dtm.host.stage_remove import remove
from edge_dtm.host.trajectory.generate import (
    check_lengths,
    generate_reference,
    signed_margins,
    split_rows,
)
from edge_dtm.host.trajectory.prompts import Prompt, packaged_prompts, read_prompts, sample_prefixes
from edge_dtm.llamacpp import probe_model
from edge_dtm.llamacpp.runner import LlamaRunner, context_needed, replay_tokens
from edge_dtm.llamacpp.tensors import describe
from edge_dtm.report import summary
from edge_dtm.search import target
from edge_dtm.search.allocation import least_divergent_share, search, search_transfer
from edge_dtm.search.budget import ByteBudget, byte_budget
from edge_dtm.search.cost_table import CostTable
from edge_dtm.search.frontier import frontier
from edge_dtm.search.predictor import Prediction, Predictor

SAMPLED_PROMPTS = 40
EXTRA_PROMPTS = 48  # sampled too, but only ever used to fit error feedback and scales
PACKAGED_PROMPTS = 48  # measured besides the user's own
HELD_OUT_SHARE = 2 / 3
TRANSFER_TRIES, TRANSFER_SLACK = 4, 0.001  # the estimate is a few tenths of a per cent off
UNLIMITED_BYTES = 2**62
MEASURED_SEQUENCES = 32  # enough for the ranking; more only narrows each cost (z^2 is a chi^2)
METHOD = 3  # of the measurement; a change of it makes old costs in a work folder void
SAME_LOGITS = 1e-3  # relative to the largest: float32 rounding through all layers stays below
COMPUTE_BUFFER_BYTES = 64 * 2**20  # llama.cpp's graph buffers, besides the logits of one batch


@dataclass(frozen=True)
class Settings:
    """What `edge-dtm compress` was asked for. max_sdt and zero_share are shares, min_fdt tokens."""

    model: Path
    out: Path
    profile: DeviceProfile
    max_bytes: int | None = None
    max_sdt: float | None = None
    min_fdt: float | None = None
    types: tuple[str, ...] = CANDIDATE_TYPES
    zero_share: float = 0.0
    prompts: Path | None = None
    tokens: int = 96
    device: str = "auto"
    seed: int = 0
    resume: bool = True
    feedback: bool = True
    equalize: bool = True
    imatrix: Path | None = None
    mask_score: str = SCORES[0]
    max_transfer: int | None = None  # bytes of the GGUF after zstd
    sparsity_steps: int = 1
    unlimited: bool = False  # whatever size the plan has
    in_order: bool = True
    remove: float | None = None  # of the block matrices; REMOVE_IF_WORTH: the search decides
    recover_steps: int = 0
    int8_share: float | None = None  # of the components, instead of a search

    @property
    def sparse(self) -> bool:
        """Whether treatments with zeros come into question."""
        return self.zero_share > 0 or self.max_transfer is not None


@dataclass(frozen=True)
class Measured:
    """What llama.cpp said about one GGUF on the held-out sequences."""

    record: Record
    divergence: Divergence
    perplexity: float


def compress(settings: Settings, stages: Stages) -> Path:
    """Make the bundle in settings.out and return that folder. EdgeDtmError on anything that
    cannot be done, before the long part wherever it can be known."""
    run = Pipeline(settings, stages)
    run.prepare()
    reference = run.reference()
    remove(run, reference)
    sparsify(run, reference)
    table, shipped = run.costs(reference)
    predictor = run.predictor(reference)
    floor = run.noise_floor(reference)
    plan, point, measured = run.best(table, predictor, shipped, reference)
    measured = recover_plan(run, plan, run.exported, reference, measured)
    packaged = run.on_packaged_prompts(reference)
    run.weigh_zeros(plan)
    run.finish(table, predictor, plan, point, measured, floor, reference, packaged)
    return settings.out


class Pipeline:
    """The stages of `compress`, in the order of its body; each leaves its result in `work`."""

    def __init__(self, settings: Settings, stages: Stages) -> None:
        self.s, self.stages = settings, stages
        self.work = settings.out / "work"
        self.threads = default_threads()
        self.keep_activations = False
        self.imatrix_vectors: dict[str, npt.NDArray[np.float32]] | None = None
        self.run_settings = RunSettings(threads=self.threads)
        self.keep_calibration = settings.sparse  # masks are fitted once more for the export
        self.held: dict[str, float] = {}  # component -> share of zeros that has to stay
        self.story: dict[str, Any] = {}  # what was done besides types and masks, for the report

    def prepare(self) -> None:
        """Everything that can fail early does so here."""
        s = self.s
        self.torch_device = choose_device(s.device)
        self.checkpoint: Checkpoint = open_checkpoint(s.model)
        if self.checkpoint.on_grid:
            self.stages.note(
                f"warning: {s.model.name} is already quantized ({self.checkpoint.on_grid}): its "
                "weights lie on that grid, which flatters types of the same grid; start from the "
                "unquantized checkpoint where you can"
            )
        config = self.checkpoint.config
        self.rebase(self.checkpoint)
        unfit = [c.name for c in self.components if not any(c.fits(t) for t in s.types)]
        if unfit:
            raise EdgeDtmError(
                f"none of --types {','.join(s.types)} divides the rows of {len(unfit)} components "
                f"({', '.join(unfit[:3])}, ...): add a type with blocks of 32, for example Q8_0"
            )
        if s.imatrix is not None:
            self.imatrix_vectors = read_imatrix(s.imatrix)
            check_imatrix(self.imatrix_vectors, self.components)
        _check_folder(s.out)
        tokenizer = self.checkpoint.tokenizer
        self.prompts: list[Prompt] = (
            read_prompts(s.prompts, tokenizer) if s.prompts else packaged_prompts(tokenizer)
        )
        check_lengths(self.prompts, s.tokens, config.context_length)
        with self.stages(
            "Checking the checkpoint", sum(c.weights for c in self.components)
        ) as advance:
            self.checkpoint.check(advance)
        self.f16_bytes = export.f16_plan(self.checkpoint, self.fixed_bytes).size_bytes
        self.budget = self._budget(config.context_length, config.kv_bytes_per_token, config.vocab)
        smallest = self.fixed_bytes + sum(
            min(c.size_bytes(Treatment(t)) for t in s.types if c.fits(t)) for c in self.components
        )
        if smallest > self.max_bytes and s.remove is None:
            raise EdgeDtmError(
                f"the smallest plan takes {smallest:,} bytes, the budget is {self.max_bytes:,}: "
                "raise --max-bytes, allow smaller --types or choose a smaller model"
            )
        if s.zero_share:
            needed = self.fixed_bytes + least_bytes_with_zeros(
                self.components, s.types, s.zero_share
            )
            if needed == float("inf"):
                raise EdgeDtmError(
                    f"an average of {s.zero_share:.0%} zeros cannot be reached with --types "
                    f"{','.join(s.types)}: zeros are put into {' and '.join(SPARSE_TYPES)} only; "
                    "allow one of these or lower --sparsity"
                )
            if needed > self.max_bytes and s.remove is None:
                raise EdgeDtmError(
                    f"an average of {s.zero_share:.0%} zeros takes about {needed:,.0f} bytes, "
                    f"since zeros are put into {' and '.join(SPARSE_TYPES)} only, and the budget "
                    f"is {self.max_bytes:,}: raise --max-bytes or lower --sparsity"
                )
        if s.recover_steps:
            self._check_memory()
        if not s.resume:
            shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir(parents=True, exist_ok=True)
        needed = (14 if s.recover_steps else 2) * self.f16_bytes
        if shutil.disk_usage(self.work).free < needed:
            raise EdgeDtmError(
                f"{s.out} has {shutil.disk_usage(self.work).free:,} bytes free, about {needed:,} "
                "are needed: free some space or choose another folder"
            )
        self.key = digest_of(
            {
                "model": self.checkpoint.check(),
                "seed": s.seed,
                "tokens": s.tokens,
                "prompts": [p.ids for p in self.prompts],
                "sampled": [SAMPLED_PROMPTS, EXTRA_PROMPTS, PACKAGED_PROMPTS],
                "held_out": HELD_OUT_SHARE,
                "versions": export.provenance(self.checkpoint)["packages"],
            }
        )
        self.base_key = self.key

    @classmethod
    def reopen(
        cls, settings: Settings, stages: Stages, threads: int | None = None
    ) -> tuple[Pipeline, Reference]:
        """The pipeline on the work folder of an earlier run in settings.out, and its reference.

        Seed, tokens and prompts are the earlier run's, whatever settings say of them. EdgeDtmError
        when there is no work folder of this model.
        """
        if not settings.model.exists():
            raise EdgeDtmError(f"{settings.model} does not exist: give the model it was made from")
        checkpoint = open_checkpoint(settings.model)
        with stages(
            "Checking the checkpoint", sum(c.weights for c in checkpoint.components())
        ) as advance:
            sha256 = checkpoint.check(advance)
        found = []
        work = settings.out / "work"
        for path in work.glob("reference-*.npz"):
            reference = Reference.load(path)
            if reference.provenance.get("model_sha256") == sha256:
                found.append((path.stat().st_mtime, path, reference))
        if not found:
            raise EdgeDtmError(
                f"{work} holds no reference of {settings.model.name}: run edge-dtm compress first, "
                "with the same model, and keep its work folder"
            )
        _, path, reference = max(found, key=lambda f: f[0])
        if len(found) > 1:
            stages.note(f"{len(found)} references of this model in the work folder: newest taken")
        settings = replace(
            settings,
            tokens=int(reference.provenance["tokens"]),
            seed=int(reference.provenance["seed"]),
        )
        run = cls(settings, stages)
        # What `prepare` sets, but without the prompts and the budget: those are settled.
        run.torch_device = choose_device(settings.device)
        run.checkpoint = checkpoint
        run.key = run.base_key = path.stem.removeprefix("reference-")
        run.rebase(checkpoint)
        run.f16_bytes = export.f16_plan(checkpoint, run.fixed_bytes).size_bytes
        if threads is not None:
            run.threads, run.run_settings = threads, RunSettings(threads=threads)
        return run, reference

    def _budget(self, context: int, kv_bytes_per_token: int, vocab: int) -> ByteBudget | None:
        """The profile's budget, and self.max_bytes, which --max-bytes overrides."""
        if self.s.unlimited:
            self.max_bytes = UNLIMITED_BYTES
            self.budget_text = "Budget: none, the experiment decides the size."
            self.stages.note(self.budget_text)
            return None
        if self.s.max_bytes is not None:
            self.max_bytes = self.s.max_bytes
            self.budget_text = f"Budget: {self.max_bytes:,} bytes, as asked for."
            self.stages.note(self.budget_text)
            return None
        budget = byte_budget(
            self.s.profile,
            kv_bytes_per_token=kv_bytes_per_token,
            compute_buffer_bytes=COMPUTE_BUFFER_BYTES + self.run_settings.batch_tokens * vocab * 4,
            f16_file_bytes=self.f16_bytes,
            n_ctx=min(self.s.profile.n_ctx, context),
        )
        self.max_bytes = budget.bytes
        self.budget_text = budget.explain()
        self.stages.note(self.budget_text)
        return budget

    def _check_memory(self) -> None:
        """EdgeDtmError when recovery would not fit into the memory that is free now."""
        blocks = sum(c.weights for c in self.components if c.in_block)
        edge = self.checkpoint.config.vocab * self.checkpoint.config.hidden
        needed = recovery_bytes(blocks, edge, any(t != "F16" for t in self.s.types))
        free = (
            torch.cuda.mem_get_info(self.torch_device)[0]
            if self.torch_device.type == "cuda"
            else room().free_bytes
        )
        if free < needed:
            raise EdgeDtmError(
                f"--recover needs about {needed / 1e9:.0f} GB of memory on {self.torch_device} and "
                f"{free / 1e9:.0f} GB are free: leave it out, or use --device cpu or a larger "
                "machine"
            )

    def forget_model(self) -> None:
        """Free the loaded model, for another one."""
        self.__dict__.pop("_loaded", None)

    def rebase(self, base: Checkpoint) -> None:
        """From here on `base` is what is measured, treated and exported: the checkpoint itself, or
        what removal and recovery made of it. It is held against the checkpoint's reference."""
        self.base = self.equalized = base
        if not self.held:
            self.dense = base  # the last without zeros
        self.components = base.components()
        self.fixed_bytes = export.fixed_bytes(base)
        self.forget_model()
        if base is not self.checkpoint:
            self.base_key = digest_of([self.key, base.check()])

    def model(self) -> Any:
        """The base as a torch module; one model is kept at a time."""
        if not hasattr(self, "_loaded"):
            with self.stages("Loading the model", 1):
                self._loaded = load_model(self.base, self.torch_device)
        return self._loaded

    def predictor(self, reference: Reference) -> Predictor:
        """What costs of the base mean in tokens."""
        calibration = reference.part(CALIBRATION)
        if self.base is self.checkpoint:
            return Predictor(calibration.margins, calibration.generated_lengths)
        path = self.work / f"margins-{self.base_key}.npz"
        if not path.is_file():
            with self.stages("Margins of the changed model", 1):
                margins = signed_margins(self.model(), calibration)
            save_npz(path, {"margins": margins}, {"kind": "margins"})
        arrays, _ = load_npz(path, ["margins"], "margins")
        return Predictor(arrays["margins"], calibration.generated_lengths)

    def reference(self) -> Reference:
        """The original's greedy tokens on all prompts, from the work folder or made now."""
        path = self.work / f"reference-{self.key}.npz"
        if path.is_file():
            self.stages.note("Greedy reference: taken from the work folder")
            return Reference.load(path)
        s, model = self.s, self.model()
        tokenizer = self.checkpoint.tokenizer
        with self.stages("Sampling prompts", 1):
            own = sample_prefixes(model, tokenizer, self.prompts, SAMPLED_PROMPTS, s.seed)
            extra = sample_prefixes(model, tokenizer, self.prompts, EXTRA_PROMPTS, s.seed + 1)
        base = list(dict.fromkeys([*self.prompts, *own]))
        packaged = packaged_prompts(tokenizer)[:PACKAGED_PROMPTS] if s.prompts else []
        prompts = list(dict.fromkeys([*base, *extra, *packaged]))
        split = np.full(len(prompts), PACKAGED, dtype=np.uint8)
        split[: len(base)] = split_rows(len(base), round(len(base) * HELD_OUT_SHARE), s.seed)
        split[len(base) : len(dict.fromkeys([*base, *extra]))] = EXTRA
        with self.stages("Greedy reference", len(prompts) * s.tokens) as advance:
            reference = generate_reference(
                model,
                prompts,
                tokens=s.tokens,
                eos_ids=self.checkpoint.tokenizer.eos_ids,
                split=split,
                provenance={
                    **export.provenance(self.checkpoint),
                    "seed": s.seed,
                    "tokens": s.tokens,
                    "device": str(self.torch_device),
                },
                parts=self.work / f"reference-{self.key}.parts",
                progress=advance,
            )
        reference.save(path)
        shutil.rmtree(self.work / f"reference-{self.key}.parts", ignore_errors=True)
        return reference

    def costs(
        self, reference: Reference, settings: Settings | None = None
    ) -> tuple[CostTable, Shipped]:
        """The cost of every treatment of every component, and the blocks it was measured with.
        settings: in place of the run's, where only some treatments are wanted."""
        s = settings or self.s
        treatments = [
            candidate_treatments(c, s.types, s.sparse, self.held.get(c.name, 0.0))
            for c in self.components
        ]
        key = f"{self.base_key}-{self.method(s)}"
        results = self.work / f"costs-{key}.jsonl"
        measured, _ = calibration_rows(reference)
        activations, calibration = self.captures(reference)
        known = read_costs(results)
        complete = all(c.name in known for c in self.components) and (
            not s.equalize or (self.work / f"scales-{METHOD}-{self.base_key}.npz").is_file()
        )
        if complete:
            self.stages.note("Sensitivity: taken from the work folder")
        else:
            self.capture(activations, calibration)
        if s.equalize:
            self.equalized = self._equalized(calibration, reference.rows(measured[:4]))
        self.forget_model()
        shipped = Shipped(self.work / f"shipped-{key}", self.equalized)
        if not complete:
            if self.base is self.checkpoint:
                self._save_imatrix(calibration)
            if s.equalize:
                activations.scales = self.scales()
                activations.config = self.base.config
            with self.stages("Sensitivity", sum(c.weights for c in self.components)) as advance:
                sensitivity(
                    activations,
                    self.components,
                    treatments,
                    self.equalized.hf_tensor,
                    self.torch_device,
                    self.checkpoint.config.tied,
                    results,
                    advance,
                    calibration if s.feedback else None,
                    shipped,
                    self.imatrix_vectors,
                    s.mask_score,
                    s.max_transfer is not None,
                )
            known = read_costs(results)
        if not self.keep_activations:
            activations.remove()
            if not self.keep_calibration:
                calibration.remove()
        transfers = None
        if s.max_transfer is not None:
            transfers = tuple(tuple(known[c.name]["transfer_bytes"]) for c in self.components)
        table = CostTable(
            self.components,
            tuple(map(tuple, treatments)),
            tuple(tuple(known[c.name]["costs"]) for c in self.components),
            self.fixed_bytes,
            transfers,
            self.fixed_bytes,
        )
        return table, shipped

    def captures(self, reference: Reference) -> tuple[Activations, Calibration]:
        measured, fitted = calibration_rows(reference)
        return (
            Activations(
                self.work / f"activations-{self.base_key}",
                reference.rows(measured),
                self.components,
            ),
            Calibration(
                self.work / f"calibration-{self.base_key}", reference.rows(fitted), self.components
            ),
        )

    def capture(self, activations: Activations | None, calibration: Calibration) -> None:
        """Run what is not captured yet through the base."""
        total = len(calibration.reference) + (len(activations.reference) if activations else 0)
        with self.stages("Gradients", total) as advance:
            if activations:
                activations.capture(self.model(), self.s.seed, advance)
            calibration.capture(self.model(), self.s.seed, advance)

    def scales(self) -> Scales:
        """Of the equalized base; empty without equalization."""
        return getattr(self.equalized, "scales", {})

    def fit_plan_zeros(self, plan: Plan, shipped: Shipped, reference: Reference) -> None:
        """The blocks of the plan's components with zeros, as they were measured."""
        missing = [
            (c, t)
            for c, t in zip(plan.components, plan.treatments, strict=True)
            if t.zero_share and shipped.is_fitted(c, t) and not shipped.has(c, t)
        ]
        if not missing:
            return
        _, calibration = self.captures(reference)
        self.capture(None, calibration)
        self.forget_model()
        with self.stages("Fitting what the zeros left", sum(c.weights for c, _ in missing)) as done:
            fit_zeros(
                missing,
                calibration,
                self.scales(),
                self.base.config if self.s.equalize else None,
                self.equalized.hf_tensor,
                self.torch_device,
                shipped,
                self.imatrix_vectors,
                self.s.mask_score,
                done,
            )

    def method(self, s: Settings) -> str:
        """What the costs depend on besides model, prompts and seed."""
        given = self.imatrix_vectors or {}
        vectors = {k: hashlib.sha256(v.tobytes()).hexdigest() for k, v in given.items()}
        said = [METHOD, s.types, s.zero_share > 0, s.feedback, s.equalize, sorted(vectors.items())]
        if s.sparse:
            said += [SPARSE_LEVELS, s.mask_score, s.max_transfer is not None, self.held]
        return digest_of(said)

    def _equalized(self, calibration: Calibration, some: Reference) -> Checkpoint:
        """The checkpoint with its scales, from the work folder or found and proved now."""
        path, config = self.work / f"scales-{METHOD}-{self.base_key}.npz", self.base.config
        if path.is_file():
            return EqualizedCheckpoint(self.base, load_scales(path, config))
        with self.stages("Equalization", len(sites(config))) as advance:
            scales = find_scales(calibration, self.base, advance)
        equalized = EqualizedCheckpoint(self.base, scales)
        original = None if self.base is self.checkpoint else top_logits(self.model(), some)
        self.forget_model()
        with self.stages("Checking the equalized model", 1):
            model = load_model(equalized, self.torch_device)
            difference = logit_difference(model, some, original)
        if not difference <= SAME_LOGITS:
            raise EdgeDtmError(
                f"equalization moved the logits by {difference:.1e} of the largest, more than "
                f"rounding does ({SAME_LOGITS:.0e}): use --no-equalize, and please report this"
            )
        save_scales(path, scales)
        return equalized

    def _save_imatrix(self, calibration: Calibration) -> None:
        """The original model's importance vectors as llama.cpp's tools know them."""
        tied = self.checkpoint.config.tied
        names = [c.name for c in self.components if tied or c.name != "token_embd"]
        save_npz(
            self.work / f"imatrix-{self.key}.npz",
            {n: calibration.input_squares(n).astype(np.float32) for n in names},
            {"kind": "imatrix", "tokens": calibration.tokens, "names": names},
        )

    def imatrix(self) -> tuple[dict[str, npt.NDArray[np.float32]], int]:
        """The importance vectors and the tokens they are from; `costs` makes them."""
        return load_imatrix(self.work / f"imatrix-{self.key}.npz")

    def measure(
        self, path: Path, reference: Reference, title: str, part: int = HELD_OUT
    ) -> Measured:
        """Replay the held-out (or another) part in llama.cpp, teacher-forced."""
        held_out = reference.part(part)
        with (
            self.stages(title, replay_tokens(held_out)) as advance,
            LlamaRunner(path, self.run_settings, context_needed(held_out)) as runner,
        ):
            record = runner.teacher_forced(held_out, advance)
        return self.judge(record, held_out)

    def judge(self, record: Record, held_out: Reference, near_tie: float = 0.0) -> Measured:
        lengths = held_out.generated_lengths
        return Measured(
            record,
            compare(held_out.generated_ids, record.ids, lengths, held_out.margins, near_tie),
            perplexity(record.reference_log_probabilities, lengths),
        )

    def _known(self, saved: Path) -> Record | None:
        """What llama.cpp said in an earlier run, unless it ran with other settings."""
        record = Record.load(saved) if saved.is_file() else None
        return record if record and record.settings == self.run_settings.to_json() else None

    def noise_floor(self, reference: Reference) -> dict[str, Any]:
        """SDT and FDT of the uncompressed F16 model in llama.cpp: nothing can be below that."""
        saved = self.work / f"floor-{self.key}.npz"
        held_out = reference.part(HELD_OUT)
        if (known := self._known(saved)) is not None:
            floor = self.judge(known, held_out)
        else:
            plan = export.f16_plan(self.checkpoint, export.fixed_bytes(self.checkpoint))
            path = self.work / "f16.gguf"
            with self.stages("Exporting F16", sum(c.weights for c in plan.components)) as advance:
                export.export_gguf(self.checkpoint, plan, path, {}, advance)
            floor = self.measure(path, reference, "Noise floor in llama.cpp")
            floor.record.save(saved)
            path.unlink()
        mask = divergent_mask(held_out.generated_ids, floor.record.ids, held_out.generated_lengths)
        first = first_divergent_tokens(mask, held_out.generated_lengths)
        ties = held_out.margins[mask]
        self.near_tie_margin = float(np.percentile(ties, 95)) if ties.size else 0.0
        self.floor = floor = self.judge(floor.record, held_out, self.near_tie_margin)
        return {
            **floor.divergence.to_json(),
            "perplexity": floor.perplexity,
            "first_divergent_tokens": first.tolist(),
            "lengths": held_out.generated_lengths.tolist(),
            "type": "F16",
        }

    def best(
        self,
        table: CostTable,
        predictor: Predictor,
        shipped: Shipped,
        reference: Reference,
    ) -> tuple[Plan, Prediction, Measured]:
        """The plan, exported to the work folder and measured; with a target, the smallest that was
        measured to meet it."""
        s = self.s
        allowed = table.restricted(s.types, sparse=s.sparse)

        def measured_plan(limit: int) -> tuple[Plan, Prediction, Measured]:
            if s.max_transfer is not None:
                plan, self.exported = self._within_transfer(allowed, limit, shipped, reference)
            else:
                plan = self._search(allowed, limit)
                self.exported = fit_plan(self, plan, shipped, reference)
            return (
                plan,
                predictor.predict(table.cost(plan)),
                self.export_and_measure(plan, self.exported, reference),
            )

        goal = target.Target(s.max_sdt, s.min_fdt)
        if goal == target.Target():
            return measured_plan(self.max_bytes)

        def attempt(limit: int) -> target.Attempt:
            plan, predicted, measured = measured_plan(limit)
            d = measured.divergence
            made = target.Attempt(
                plan.size_bytes, predicted.sdt, predicted.fdt, d.sdt.value, d.fdt.value
            )
            verdict = "meets" if goal.met(made.sdt, made.fdt) else "misses"
            self.stages.note(
                f"{made.size_bytes:,} bytes: SDT {summary.interval(d.sdt.to_json(), True)}, mean "
                f"FDT {summary.interval(d.fdt.to_json(), False)}: {verdict} the target"
            )
            return made

        best, tried = target.smallest(frontier(allowed, predictor), goal, attempt, self.max_bytes)
        if best is None:
            floor = self.floor.divergence
            closest = tried[-1] if tried else None
            raise EdgeDtmError(
                f"no plan within {self.max_bytes:,} bytes has {goal}: "
                + (
                    f"{closest.size_bytes:,} bytes have a measured SDT of {closest.sdt:.2%} and a "
                    f"mean FDT of {closest.fdt:.1f}; "
                    if closest
                    else ""
                )
                + f"the uncompressed F16 file in llama.cpp has {floor.sdt.value:.2%} and "
                f"{floor.fdt.value:.1f} (the noise floor); relax --max-sdt/--min-fdt, raise "
                "--max-bytes or allow more --types"
            )
        return measured_plan(best.size_bytes)

    def _search(self, table: CostTable, limit: int) -> Plan:
        s = self.s
        if s.int8_share is not None:
            plan = least_divergent_share(table, "Q8_0", "F16", s.int8_share)
            if plan.size_bytes > limit:
                raise EdgeDtmError(
                    f"{s.int8_share:.0%} of the components in Q8_0 and the rest in F16 take "
                    f"{plan.size_bytes:,} bytes, the budget is {limit:,}: raise --max-bytes"
                )
            return plan
        return search(table, limit, s.zero_share)

    def export_and_measure(
        self,
        plan: Plan,
        shipped: Shipped | RecoveredBlocks,
        reference: Reference,
        checkpoint: Checkpoint | None = None,
    ) -> Measured:
        """checkpoint: in place of the equalized base, for the vectors."""
        path, made = self._export(plan, shipped, checkpoint)
        saved = self.work / f"host-{made}.npz"
        texts = [*NASTY_STRINGS, *(str(t) for t in reference.texts)]
        wrong = tokenization_mismatches(self.checkpoint.tokenizer, path, texts)
        if wrong:
            raise EdgeDtmError(
                f"llama.cpp tokenizes {len(wrong)} of {len(texts)} strings otherwise than the "
                f"checkpoint's tokenizer, first: {wrong[0]}; this tokenizer is not supported"
            )
        held_out = reference.part(HELD_OUT)
        if (known := self._known(saved)) is not None:
            return self.judge(known, held_out, self.near_tie_margin)
        measured = self.measure(path, reference, "Plan in llama.cpp")
        measured.record.save(saved)
        return self.judge(measured.record, held_out, self.near_tie_margin)

    def _export(
        self, plan: Plan, shipped: Shipped | RecoveredBlocks, checkpoint: Checkpoint | None = None
    ) -> tuple[Path, str]:
        """The GGUF in the work folder, and the short name of what is in it."""
        path, mark = self.work / "model.gguf", self.work / "model.json"
        made = digest_of([plan.hash, shipped.folder.name])
        if not mark.is_file() or mark.read_text() != made or not _is_plan(path, plan):
            mark.unlink(missing_ok=True)
            with self.stages(
                "Exporting the plan", sum(c.weights for c in self.components)
            ) as advance:
                export.export_gguf(
                    checkpoint or self.equalized, plan, path, shipped.blocks, advance
                )
            mark.write_text(made)
        return path, made

    def _within_transfer(
        self, table: CostTable, limit: int, shipped: Shipped, reference: Reference
    ) -> tuple[Plan, Shipped]:
        """The best plan whose real file keeps the limit after zstd; estimates are a little off."""
        wanted = self.s.max_transfer
        assert wanted is not None
        aim, real = wanted, 0
        for _ in range(TRANSFER_TRIES):
            plan = search_transfer(table, limit, aim)
            exported = fit_plan(self, plan, shipped, reference)
            path, _ = self._export(plan, exported)
            real = packed_bytes(path)
            self.stages.note(f"{real:,} bytes after zstd, the limit is {wanted:,}")
            if real <= wanted:
                return plan, exported
            aim = int(aim * wanted / real * (1 - TRANSFER_SLACK))
        raise EdgeDtmError(
            f"no plan was found that has at most {wanted:,} bytes after zstd, the last had {real:,}: "
            "raise --max-transfer"
        )

    def weigh_zeros(self, plan: Plan) -> None:
        """What the plan's zeros bought, against the same types without zeros."""
        if not plan.zero_share:
            return
        path, twin = self.work / "model.gguf", self.work / "twin.gguf"
        dense = Plan(
            plan.components, tuple(Treatment(t.type) for t in plan.treatments), plan.fixed_bytes
        )
        export.export_gguf(self.dense, dense, twin, {})
        with self.stages("What the zeros bought", ROUNDS) as advance:
            found = weigh({"zeros": path, "dense": twin}, self.run_settings, advance)
        twin.unlink()
        self.story["zeros"] = {
            "with": found["zeros"].to_json(),
            "without": found["dense"].to_json(),
            "words": in_words("zeros", found["zeros"], found["dense"]),
        }

    def on_packaged_prompts(self, reference: Reference) -> Measured | None:
        """With prompts of the user's own: the same file on the packaged prompts, none of which
        were calibrated on, to show what the plan gave up outside the user's domain."""
        packaged = reference.part(PACKAGED)
        if not len(packaged):
            return None
        made = (self.work / "model.json").read_text()
        saved = self.work / f"packaged-{made}.npz"
        if saved.is_file():
            return self.judge(Record.load(saved), packaged, self.near_tie_margin)
        found = self.measure(
            self.work / "model.gguf", reference, "Packaged prompts in llama.cpp", PACKAGED
        )
        found.record.save(saved)
        return self.judge(found.record, packaged, self.near_tie_margin)

    def finish(
        self,
        table: CostTable,
        predictor: Predictor,
        plan: Plan,
        prediction: Prediction,
        measured: Measured,
        floor: Mapping[str, Any],
        reference: Reference,
        packaged: Measured | None = None,
    ) -> None:
        """Put the bundle's files in their place, the manifest last."""
        s, out = self.s, self.s.out
        d = measured.divergence
        held_out = reference.part(HELD_OUT)
        plan_json = {
            **plan.to_json(),
            "sha256": plan.hash,
            "predicted": prediction.to_json(),
            "frontier": [p.to_json() for p in frontier(table, predictor)],
            "costs": [
                {"name": c.name, "costs": {texts[t]: v for t, v in zip(ts, cs, strict=True)}}
                for c, ts, cs in zip(table.components, table.treatments, table.costs, strict=True)
                for texts in [distinct_texts(ts)]
            ],
            "units": {
                "size": "bytes",
                "cost": "logits squared",
                "sigma": "logits",
                "fdt": "tokens",
            },
        }
        (self.work / "plan.json").write_text(strict_json.dumps(plan_json))
        held_out.save(self.work / "reference.npz")
        measured.record.save(self.work / "host.npz")
        export.write_measured(self.work / "model.gguf", d.sdt.value, d.fdt.value)
        original = held_out.top_logits[:, :, 0] - held_out.log_normalizers
        results = {
            **d.to_json(),
            "predicted": prediction.to_json(),
            "perplexity": measured.perplexity,
            "original_perplexity": perplexity(original, held_out.generated_lengths),
            "noise_floor": dict(floor),
            "size_bytes": plan.size_bytes,
            "f16_bytes": self.f16_bytes,
            "zero_share": plan.zero_share,
            "packaged_prompts": None if packaged is None else packaged.divergence.to_json(),
            "run_settings": self.run_settings.to_json(),
            **self.story,
        }
        if s.max_transfer is not None:
            results["packed_bytes"] = packed_bytes(self.work / "model.gguf")
            if results["packed_bytes"] > s.max_transfer:
                raise EdgeDtmError(
                    f"after recovery the model has {results['packed_bytes']:,} bytes after zstd, "
                    f"more than {s.max_transfer:,}: raise --max-transfer or leave out --recover"
                )
        details = {
            **export.provenance(self.checkpoint),
            "profile": s.profile.name,
            "budget": self.budget_text,
            "max_bytes": self.max_bytes,
            "seed": s.seed,
            "tokens": s.tokens,
            "types": list(s.types),
            "prompts": s.prompts.name if s.prompts else "packaged",
            "calibration_sequences": int(
                ((reference.split == CALIBRATION) | (reference.split == EXTRA)).sum()
            ),
            "error_feedback": s.feedback,
            "equalization": s.equalize,
            "imatrix": s.imatrix.name if s.imatrix else "our own",
            "work_key": self.key,
            "held_out_sequences": len(held_out),
            **({"mask_score": s.mask_score} if s.sparse else {}),
            **({"sparsity_steps": s.sparsity_steps} if s.zero_share else {}),
            **({"recover_steps": s.recover_steps} if s.recover_steps else {}),
        }
        quantized = any(t.type not in ("F32", "F16", "BF16") for t in plan.treatments)
        record = measured.record
        healthy = healthy_range(
            held_out.generated_ids, record.top_ids, record.top_logits, held_out.generated_lengths
        )
        thresholds = thresholds_from(d, healthy, quantized, s.max_sdt, s.min_fdt)
        probe_model.record(self.work / "probe.gguf", self.run_settings).save(
            self.work / bundle.PROBE_RECORD
        )
        (self.work / "probe.gguf").unlink()
        zeros = (
            {
                t.component: t.zero_share or 0.0
                for t in describe(self.work / "model.gguf")
                if t.is_matrix
            }
            if plan.zero_share
            else {}
        )
        (self.work / "report.md").write_text(summary.markdown(plan, results, details, zeros))
        files = [*bundle.REQUIRED_FILES, "plan.json", "report.md"]
        # An old manifest or signature would vouch for files that are being replaced.
        for name in (bundle.MANIFEST, bundle.SIGNATURE):
            (out / name).unlink(missing_ok=True)
        for name in files:
            (self.work / name).replace(out / name)
        bundle.write_manifest(out, files, thresholds, details, strict_json.plain(results))
        if not self.keep_activations:
            for path in self.work.glob("calibration-*"):
                shutil.rmtree(path, ignore_errors=True)
        self.stages.note("")
        summary.print_summary(self.stages.console, plan, results, details, self.stages.seconds, out)


def calibration_rows(reference: Reference) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Rows that costs are measured on, and rows that feedback and scales are fitted to.

    They do not overlap, unless there is but one row in all.
    """
    rows = np.flatnonzero(reference.split == CALIBRATION)
    extra = np.flatnonzero(reference.split == EXTRA)
    # Of few prompts a third has to do for the fit.
    cut = MEASURED_SEQUENCES if len(rows) > 1.5 * MEASURED_SEQUENCES else -(-len(rows) * 2 // 3)
    if not len(extra):
        cut = max(1, min(cut, len(rows) - 1))
    fitted = np.concatenate([rows[cut:], extra])
    return rows[:cut], fitted if len(fitted) else rows


def _is_plan(path: Path, plan: Plan) -> bool:
    """Whether a file left by an earlier run is the plan's, by its own words and its tensors."""
    import gguf

    try:
        field = gguf.GGUFReader(path).get_field(export.KEY_PLAN)
        if field is None or field.contents() != plan.hash:
            return False
        export.compare_with_plan(path, plan)
    except (EdgeDtmError, ValueError, OSError, IndexError, KeyError):
        return False
    return True


def _check_folder(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise EdgeDtmError(f"{out} is a file: give a folder to -o")
    known = {"work", bundle.MANIFEST, bundle.SIGNATURE, *bundle.REQUIRED_FILES, "plan.json",
             "report.md", *bundle.TOLERATED_FILES}  # fmt: skip
    foreign = sorted(p.name for p in out.iterdir() if p.name not in known) if out.exists() else []
    if foreign:
        raise EdgeDtmError(
            f"{out} holds other files ({', '.join(foreign[:3])}): give a new or a bundle's folder"
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EdgeDtmError(
            f"{out} cannot be made ({error.strerror}): choose another folder"
        ) from None
