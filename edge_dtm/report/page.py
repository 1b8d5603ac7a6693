"""The HTML page of a bundle: what data/report.html is filled with. Pure: a Report in, text out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict

from jinja2 import Environment, PackageLoader, StrictUndefined

from edge_dtm import __version__
from edge_dtm.report import charts, numbers
from edge_dtm.report.charts import Chart, MeasuredFile
from edge_dtm.report.gather import Report
from edge_dtm.report.layer_map import PARTS, chosen_costs, cost_cells, layer_map, treatment_cells
from edge_dtm.report.numbers import NOTHING, SPEEDS, interval, number, plain, share, short, spelled

# Control characters, surrogates, and those that turn the direction of what follows.
_UNSEEN = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufeff]"
)
TableCell = tuple[str, str]  # what a cell says, and in small letters below


def page(report: Report) -> str:
    """One self-contained HTML document. Nothing of the report becomes an element of it."""
    environment = Environment(
        loader=PackageLoader("edge_dtm", "data"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = (numbers.between, numbers.megabytes, numbers.plural, interval, number, plain, share)
    environment.filters |= {f.__name__: f for f in (*filters, short, spelled)}
    plan, costs = report.plan, {}
    if plan is not None:
        costs = chosen_costs(plan, {c.name: c.costs for c in report.choice.costs})
    document = environment.get_template("report.html").render(
        report=report,
        version=__version__,
        survival=_survival(report),
        histogram=_histogram(report),
        frontier=_frontier(report),
        figures=_figures(report),
        parts=PARTS,
        types={} if plan is None else plan.type_counts(),
        treatment_map=None if plan is None else layer_map(treatment_cells(plan)),
        cost_map=layer_map(cost_cells(costs)) if costs else None,
        total_cost=sum(costs.values()),
        limits=asdict(report.manifest.thresholds),
    )
    return _UNSEEN.sub("\ufffd", document)


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
    choice, sdt = report.choice, report.host.sdt
    if not choice.frontier and not report.files:
        return None
    size = report.manifest.files["model.gguf"].size_bytes
    return charts.frontier(
        [(p.size_bytes, p.sdt) for p in choice.frontier],
        None if choice.predicted is None else choice.predicted.sdt,
        [MeasuredFile("this file, measured", size, sdt), *report.files],
        number(report.noise_floor, "sdt", "value"),
    )


def _figures(report: Report) -> list[tuple[str, list[TableCell]]]:
    """(what, a cell for the host, for each device and for the noise floor)."""
    verdicts = [d.verdict for d in report.devices]
    runs = [report.host.to_json(), *(v["against_original"] for v in verdicts), report.noise_floor]
    rows = [
        ("SDT against the original", [interval(run, "sdt", True) for run in runs]),
        ("mean FDT, tokens", [interval(run, "fdt", False) for run in runs]),
    ]

    def add(label: str, devices: Sequence[str], host: str = NOTHING, floor: str = NOTHING) -> None:
        rows.append((label, [(text, "") for text in (host, *devices, floor)]))

    host, *devices, floor = (share(number(run, "identical_share"), 0) for run in runs)
    add("sequences identical", devices, host, floor)
    if verdicts:
        for label, key, text in (
            ("KL from the host, nats", "kl_vs_host_nats", short),
            ("other tokens where the host was sure", "decided_sdt_vs_host", share),
            ("KL of the small F16 model, nats", "kl_probe_nats", short),
        ):
            add(label, [text(v[key]) for v in verdicts])
        kernels = [v["kernels"] for v in verdicts]
        add(
            "kernels that agree with numpy",
            [f"{sum(k['ok'] for k in ks)} of {len(ks)}" if ks else NOTHING for ks in kernels],
        )
    for label, key, scale, digits in SPEEDS:
        host_speed = report.host_prefill_tokens_per_s if key == "prefill_tokens_per_s" else None
        speeds = [number(host_speed), *(number(v["performance"], key) for v in verdicts)]
        if any(speed is not None for speed in speeds):
            host, *devices = (plain(s and s * scale, digits) for s in speeds)
            add(label, devices, host)
    if verdicts:
        add("threads", [plain(number(v["settings"], "threads"), 0) for v in verdicts])
        add("llama-cpp-python", [v["runtime"]["llama_cpp_python"] for v in verdicts])
    return rows
