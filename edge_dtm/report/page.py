"""The HTML page of a bundle: what data/report.html is filled with. Pure: a Report in, text out."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from edge_dtm import __version__
from edge_dtm.report import charts, numbers
from edge_dtm.report.charts import Chart, MeasuredFile
from edge_dtm.report.gather import Report
from edge_dtm.report.layer_map import ColourMap, chosen_costs, cost_cells, treatment_cells
from edge_dtm.report.numbers import NOTHING, between, interval, number, plain, plural, share, short

# Control characters, surrogates, and those that turn the direction of what follows.
_UNSEEN = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufeff]"
)
TableCell = tuple[str, str]  # what a cell says, and in small letters below
_SPEEDS = (
    # name, key in the verdict, digits, scale
    ("prompt, tokens/s", "prefill_tokens_per_s", 1, 1.0),
    ("decoding, tokens/s", "decode_tokens_per_s", 1, 1.0),
    ("time to first token, s", "time_to_first_token_s", 2, 1.0),
    ("one token, median, ms", "p50_ms", 1, 1.0),
    ("one token, 95th percentile, ms", "p95_ms", 1, 1.0),
    ("peak memory, MB", "peak_rss_bytes", 0, 1e-6),
)


def page(report: Report) -> str:
    """One self-contained HTML document. Nothing of the report becomes an element of it."""
    plan = report.plan
    costs = {} if plan is None else chosen_costs(plan, report.costs)
    document = (
        _environment()
        .get_template("report.html")
        .render(
            report=report,
            version=__version__,
            title=_title(report),
            tiles=_tiles(report),
            survival=_survival(report),
            histogram=_histogram(report),
            frontier=_frontier(report),
            figures=_figures(report),
            types=[] if plan is None else plan.type_counts().items(),
            treatment_map=None if plan is None else ColourMap.of(treatment_cells(plan), "blue"),
            cost_map=ColourMap.of(cost_cells(costs), "orange") if costs else None,
            total_cost=sum(costs.values()),
        )
    )
    return _UNSEEN.sub("\ufffd", document)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("edge_dtm", "data"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = (numbers.megabytes, plain, plural, share, short, numbers.spelled)
    environment.filters |= {f.__name__: f for f in filters}
    return environment


def _title(report: Report) -> str:
    details = report.manifest.provenance
    model, profile = details.get("model"), details.get("profile")
    if not isinstance(model, str):
        return report.name
    return f"{model} for {profile}" if isinstance(profile, str) else model


def _tiles(report: Report) -> list[tuple[str, str, list[str]]]:
    """(name, figure, lines below)."""
    host = report.host
    measured = report.manifest.measured
    size = report.manifest.files["model.gguf"].size_bytes
    f16 = number(measured, "f16_bytes")
    floor = measured.get("noise_floor")
    floors = (
        interval(floor, "sdt", True)[0],
        interval(floor, "fdt", False)[0],
        share(number(floor, "identical_share"), 0),
    )
    noise = [[] if value == NOTHING else [f"noise floor {value}"] for value in floors]
    sdt, fdt = (f"{between(i.low, i.high, i is host.sdt)} (95 %)" for i in (host.sdt, host.fdt))
    return [
        ("SDT", share(host.sdt.value), [sdt, *noise[0]]),
        (
            f"mean FDT of at most {plain(host.largest_fdt)} tokens",
            plain(host.fdt.value),
            [fdt, *noise[1]],
        ),
        (
            "sequences identical",
            share(host.identical_share, 0),
            ["without any other token", *noise[2]],
        ),
        ("file size", numbers.megabytes(size), [f"{share(size / f16, 0)} of F16"] if f16 else []),
    ]


def _survival(report: Report) -> Chart:
    series = [report.host_answers.series(), *report.curves]
    if report.shown is not report.host_answers and not report.devices:
        series.insert(1, report.shown.series())
    return charts.survival_curves(series)


def _histogram(report: Report) -> Chart:
    shown = report.shown
    if shown.fed:
        counts, axis, zero = shown.divergent, "other tokens in a sequence", "no other token"
    else:
        # What is generated behind the first other token is another text.
        counts, axis, zero = shown.first, "tokens until the first other one", "another first token"
    return charts.histogram(counts.tolist(), axis, zero)


def _frontier(report: Report) -> Chart | None:
    if not report.frontier and not report.files:
        return None
    size = report.manifest.files["model.gguf"].size_bytes
    sdt = report.host.sdt
    floor = numbers.estimate(report.manifest.measured.get("noise_floor"), "sdt")
    return charts.frontier(
        report.frontier,
        None if report.predicted_sdt is None else (size, report.predicted_sdt),
        [MeasuredFile("this file, measured", size, sdt.value, sdt.low, sdt.high), *report.files],
        floor[0] if floor else None,
    )


def _figures(report: Report) -> list[tuple[str, list[TableCell]]]:
    """(what, a cell for the host, for each device and for the noise floor)."""
    floor = report.manifest.measured.get("noise_floor")
    verdicts = [d.verdict for d in report.devices]
    runs = [report.host.to_json(), *(v["against_original"] for v in verdicts), floor]
    rows = [
        ("SDT against the original", [interval(run, "sdt", True) for run in runs]),
        ("mean FDT, tokens", [interval(run, "fdt", False) for run in runs]),
        (
            "sequences identical",
            _cells([share(number(run, "identical_share"), 0) for run in runs]),
        ),
    ]
    if verdicts:
        rows += [(name, _cells([NOTHING, *t, NOTHING])) for name, t in _against_host(verdicts)]
    for name, key, digits, scale in _SPEEDS:
        host = number(report.host_prefill_tokens_per_s) if key == "prefill_tokens_per_s" else None
        values = [host, *(number(v, "performance", key) for v in verdicts)]
        if any(value is not None for value in values):
            texts = [plain(None if v is None else v * scale, digits) for v in values]
            rows.append((name, _cells([*texts, NOTHING])))
    if verdicts:
        threads = [numbers.spelled(v["settings"].get("threads")) for v in verdicts]
        builds = [v["runtime"]["llama_cpp_python"] for v in verdicts]
        rows.append(("threads", _cells([NOTHING, *threads, NOTHING])))
        rows.append(("llama-cpp-python", _cells([NOTHING, *builds, NOTHING])))
    return rows


def _cells(texts: Sequence[str]) -> list[TableCell]:
    return [(text, "") for text in texts]


def _against_host(verdicts: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """(what, a text a device)."""
    return [
        ("KL from the host, nats", [short(v["kl_vs_host_nats"]) for v in verdicts]),
        (
            "other tokens where the host was sure",
            [share(v["decided_sdt_vs_host"]) for v in verdicts],
        ),
        ("KL of the small F16 model, nats", [short(v["kl_probe_nats"]) for v in verdicts]),
        ("kernels that agree with numpy", [_kernels(v["kernels"]) for v in verdicts]),
    ]


def _kernels(kernels: Sequence[Mapping[str, Any]]) -> str:
    return f"{sum(k['ok'] for k in kernels)} of {len(kernels)}" if kernels else NOTHING
