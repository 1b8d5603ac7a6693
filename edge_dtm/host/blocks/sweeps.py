"""Two sweeps over the blocks: the residual stream forward, the margins' gradients back.

The gradient is that of the randomly signed sum of a sequence's margins, so that one backward pass
serves all of them (see sensitivity.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from edge_dtm.host.blocks.boundaries import Boundaries
from edge_dtm.host.blocks.text import Text
from edge_dtm.host.checkpoint.decoder import SITES, Taps, run_block
from edge_dtm.host.checkpoint.llama import Llama

Advance = Callable[[int], None] | None


@dataclass(frozen=True)
class Piece:
    """One batch of sequences in one block, padding left out, on the model's device.

    places: int64 (tokens,), see Text. inputs: site -> (tokens, row_length). Gradients of every
    draw: at_outputs: matrix -> (draws, tokens, rows); at_inputs: matrix -> (draws, tokens,
    row_length), through that matrix alone; before: (draws, tokens, hidden), at the residual stream
    before the block.
    """

    batch: tuple[int, ...]
    places: torch.Tensor
    inputs: dict[str, torch.Tensor]
    at_outputs: dict[str, torch.Tensor]
    at_inputs: dict[str, torch.Tensor]
    before: torch.Tensor


def sweep_forward(
    model: Llama, text: Text, boundaries: Boundaries, progress: Advance = None
) -> None:
    """Make every hidden boundary that is not there yet. progress: called with blocks done."""
    if not boundaries.has("hidden", 0):
        with boundaries.writing("hidden", 0) as rows:
            for batch in text.batches:
                embedded = model.embed(text.ids(batch)[text.real(batch)].to(model.device))
                rows[text.places(batch).numpy()] = embedded.cpu().numpy()
    for layer in range(model.layers):
        if not boundaries.has("hidden", layer + 1):
            _forward(model, text, boundaries, layer)
        if progress:
            progress(1)


@torch.no_grad()
def _forward(model: Llama, text: Text, boundaries: Boundaries, layer: int) -> None:
    block, before = model.block(layer), boundaries.rows("hidden", layer)
    with boundaries.writing("hidden", layer + 1) as rows, deterministic(model.device):
        for batch in text.batches:
            hidden = _padded(text, batch, before[text.places(batch).numpy()], model.device)
            behind = run_block(block, hidden, _turn(model, hidden))
            real = text.real(batch).to(model.device)
            rows[text.places(batch).numpy()] = behind[real].cpu().numpy()


def start_back(model: Llama, text: Text, boundaries: Boundaries) -> None:
    """The gradient behind the last block, through the last norm."""
    if boundaries.has("gradient", model.layers):
        return
    before = boundaries.rows("hidden", model.layers)
    with boundaries.writing("gradient", model.layers) as rows:
        for batch in text.batches:
            places, real = text.places(batch), text.real(batch).to(model.device)
            hidden = _padded(text, batch, before[places.numpy()], model.device).requires_grad_()
            normed = model.norm(hidden)
            draws = text.draws(batch)
            for draw in range(draws):
                (gradient,) = torch.autograd.grad(
                    normed,
                    hidden,
                    text.targets(model, batch, draw),
                    retain_graph=draw + 1 < draws,
                )
                rows[boundaries.place(places, draw)] = gradient[real].cpu().numpy()


def sweep_back(model: Llama, text: Text, boundaries: Boundaries, progress: Advance = None) -> None:
    """Make every gradient boundary that is not there yet. progress: called with blocks done."""
    start_back(model, text, boundaries)
    for layer in reversed(range(model.layers)):
        if not boundaries.has("gradient", layer):
            with boundaries.writing("gradient", layer) as rows:
                for piece in back_through(model, text, boundaries, layer):
                    keep(piece, boundaries, rows)
        if progress:
            progress(1)


def keep(
    piece: Piece, boundaries: Boundaries, rows: np.ndarray[tuple[int, int], np.dtype[np.float32]]
) -> None:
    """Put the gradients before the block into a boundary that is being written."""
    for draw, gradient in enumerate(piece.before):
        rows[boundaries.place(piece.places, draw)] = gradient.cpu().numpy()


def back_through(
    model: Llama, text: Text, boundaries: Boundaries, layer: int, parts: str = "all"
) -> Iterator[Piece]:
    """Run block `layer` forward and back on the hidden boundary before it and the gradient behind
    it, batch by batch. parts: `fitted` leaves the measured sequences out."""
    block = model.block(layer)
    before, behind = boundaries.rows("hidden", layer), boundaries.rows("gradient", layer + 1)
    for batch in text.batches:
        if parts == "fitted" and batch[0] < text.measured:
            continue
        places, real = text.places(batch), text.real(batch).to(model.device)
        hidden = _padded(text, batch, before[places.numpy()], model.device).requires_grad_()
        taps = Taps()
        with torch.enable_grad(), deterministic(model.device):
            out = run_block(block, hidden, _turn(model, hidden), taps=taps)
            wanted = [hidden, *taps.outputs.values(), *taps.inputs.values()]
            draws = text.draws(batch)
            drawn = []
            for draw in range(draws):
                rows = behind[boundaries.place(places, draw)]
                gradients = torch.autograd.grad(
                    out,
                    wanted,
                    _padded(text, batch, rows, model.device),
                    retain_graph=draw + 1 < draws,
                )
                drawn.append([g[real] for g in gradients])
        # One draw is no reason for a copy.
        at = [torch.stack(d) if draws > 1 else d[0][None] for d in zip(*drawn, strict=True)]
        outputs, count = list(taps.outputs), 1 + len(taps.outputs)
        yield Piece(
            batch,
            places,
            {site: taps.inputs[site].detach()[real] for site in SITES},
            dict(zip(outputs, at[1:count], strict=True)),
            dict(zip(taps.inputs, at[count:], strict=True)),
            at[0],
        )


def _turn(model: Llama, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return model.turn(torch.arange(hidden.shape[1], device=model.device)[None])


def _padded(
    text: Text,
    batch: tuple[int, ...],
    rows: np.ndarray[tuple[int, ...], np.dtype[np.float32]],
    device: torch.device,
) -> torch.Tensor:
    """(tokens, hidden) -> (sequences, longest, hidden), zeros where padding is."""
    real = text.real(batch)
    out = torch.zeros((*real.shape, rows.shape[-1]), device=device)
    out[real.to(device)] = torch.from_numpy(np.ascontiguousarray(rows)).to(device)
    return out


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Attention whose gradients are the same each time; on a GPU only the plain kernel's are."""
    if device.type != "cuda":
        yield
        return
    with sdpa_kernel(SDPBackend.MATH):
        yield
