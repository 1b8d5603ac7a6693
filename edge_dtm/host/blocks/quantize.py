"""The bytes of a plan: each matrix quantized once, in the type that the plan gives it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from edge_dtm.formats.plan import Component, Treatment
from edge_dtm.host.blocks.block_jobs import QuantizeJobs, layer_of, quantize_matrix
from edge_dtm.host.blocks.costs import Costs
from edge_dtm.host.blocks.edges import edge_bytes, edge_feedback, edge_importance
from edge_dtm.host.blocks.workers import workers
from edge_dtm.host.values import Run

Chosen = tuple[Component, Treatment]


def quantize(run: Run, costs: Costs, chosen: Iterable[Chosen]) -> None:
    """Put into costs.encoded what is not there yet. Every block's job is independent; what is made
    stays for other plans."""
    store = costs.encoded
    missing = [(c, t) for c, t in chosen if not store.has(c, t)]
    if not missing:
        return
    weights = sum(c.weights for c, _ in missing)
    layers = sorted({layer_of(c) for c, _ in missing if c.in_block}, reverse=True)
    for layer in layers[:1]:  # sweeps, where these files are gone, have stages of their own
        costs.data.ensure_fitted(layer)
    if any(not c.in_block for c, _ in missing):
        costs.data.ensure_ends()
    with (
        workers(QuantizeJobs(costs.data.jobs, store), costs.data.crew) as pool,
        run.stages("Quantizing the plan", weights) as advance,
    ):
        for layer in layers:
            tasks = [(c, t, costs.uses_feedback(c, t)) for c, t in _of_layer(missing, layer)]
            costs.data.ensure_fitted(layer)
            tasks.sort(key=lambda task: -task[0].weights)
            for (component, _, _), _ in pool.run(quantize_matrix, tasks):
                advance(component.weights)
            costs.data.quantized(layer)
        edges = [(c, t) for c, t in missing if not c.in_block]
        for component, treatment in edges:
            _quantize_edge(run, costs, component, treatment)
            advance(component.weights)


def _of_layer(chosen: Sequence[Chosen], layer: int) -> list[Chosen]:
    return [(c, t) for c, t in chosen if c.in_block and layer_of(c) == layer]


def _quantize_edge(run: Run, costs: Costs, component: Component, treatment: Treatment) -> None:
    inputs, tied = costs.data.edge_inputs(), costs.data.model.config.tied
    weights = costs.equalized.hf_tensor(component.name + ".weight")
    importance = costs.data.jobs.importance(component.name, costs.scales)
    if importance is None:
        importance = edge_importance(inputs, component, tied, costs.scales)
    hessian = None
    if costs.uses_feedback(component, treatment):
        hessian = edge_feedback(inputs, component, tied, costs.scales)
    data = edge_bytes(weights, treatment, hessian, importance)
    costs.encoded.save(component, treatment, data, importance)
