"""The sequences that blocks are measured on and fitted to, and where their margins are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from edge_dtm.formats.reference import Reference
from edge_dtm.host.checkpoint.llama import BATCH_TOKENS, Llama
from edge_dtm.host.checkpoint.sequences import batches_by_length, padded, reference_sequences

IntArray = npt.NDArray[np.integer[Any]]
MEASURED_DRAWS, FITTED_DRAWS = 2, 1  # the weights of tokens need less certainty than a cost does
OUTPUT_SEQUENCES = 32  # of those fitted to: enough for the moments of the gradients at the outputs


@dataclass(frozen=True)
class Text:
    """Rows of the reference: first the measured ones, then those that are fitted to.

    Fits are made on other sequences than costs, so that what is fitted cannot flatter itself.
    Tokens of all sequences stand one after another; edges (sequences + 1,) tells where each begins.
    batch_tokens: padding included, of sequences that run side by side.
    """

    reference: Reference
    measured: int
    seed: int
    batch_tokens: int = BATCH_TOKENS

    @cached_property
    def sequences(self) -> tuple[tuple[int, ...], ...]:
        """Prompt and answer without the last id, behind which nothing was generated."""
        return tuple(map(tuple, reference_sequences(self.reference)))

    @cached_property
    def edges(self) -> IntArray:
        return np.concatenate([[0], np.cumsum([len(s) for s in self.sequences])])

    @property
    def tokens(self) -> int:
        return int(self.edges[-1])

    @property
    def measured_tokens(self) -> int:
        return int(self.edges[self.measured])

    @property
    def measured_positions(self) -> int:
        """Where margins are taken among the measured tokens."""
        return int(self.reference.generated_lengths[: self.measured].sum())

    @cached_property
    def batches(self) -> tuple[tuple[int, ...], ...]:
        """Sequences run side by side, measured and fitted ones apart."""
        lengths = [len(s) for s in self.sequences]
        parts = range(self.measured), range(self.measured, len(lengths))
        return tuple(
            tuple(batch)
            for part in parts
            for batch in batches_by_length(
                lengths, sorted(part, key=lambda i: (lengths[i], i)), self.batch_tokens
            )
        )

    def draws(self, batch: Sequence[int]) -> int:
        """How many random signs its margins are summed with."""
        return MEASURED_DRAWS if batch[0] < self.measured else FITTED_DRAWS

    def ids(self, batch: Sequence[int]) -> torch.Tensor:
        """int64 (sequences, longest), padding to the right."""
        return padded([self.sequences[i] for i in batch])

    def real(self, batch: Sequence[int]) -> torch.Tensor:
        """bool (sequences, longest): False where padding is."""
        lengths = torch.tensor([len(self.sequences[i]) for i in batch])
        return torch.arange(int(lengths.max()))[None] < lengths[:, None]

    def places(self, batch: Sequence[int]) -> torch.Tensor:
        """int64 (tokens,): where the batch's tokens stand among all."""
        return torch.from_numpy(
            np.concatenate([np.arange(self.edges[i], self.edges[i + 1]) for i in batch])
        )

    def margin_positions(self, first: int, last: int) -> IntArray:
        """(positions,): where margins of sequences first to last - 1 are taken, among all tokens."""
        r = self.reference
        return np.concatenate(
            [
                self.edges[i] + r.prompt_lengths[i] - 1 + np.arange(r.generated_lengths[i])
                for i in range(first, last)
            ]
        )

    def top_ids(self, first: int, last: int) -> IntArray:
        """(positions, 2): the two likeliest ids there."""
        r = self.reference
        return np.concatenate(
            [r.top_ids[i, : r.generated_lengths[i], :2] for i in range(first, last)]
        )

    def targets(self, model: Llama, batch: Sequence[int], draw: int) -> torch.Tensor:
        """float32 (sequences, longest, hidden): gradient of the randomly signed sum of the margins
        at what the head reads."""
        r, device = self.reference, model.device
        longest = max(len(self.sequences[i]) for i in batch)
        out = torch.zeros((len(batch), longest, model.config.hidden), device=device)
        for row, i in enumerate(batch):
            first, count = int(r.prompt_lengths[i]) - 1, int(r.generated_lengths[i])
            # Signs belong to the sequence, not to the batch it happens to run in.
            signs = np.random.default_rng([self.seed, draw, i]).choice([-1.0, 1.0], count)
            top = torch.from_numpy(r.top_ids[i, :count, :2].astype(np.int64)).to(device)
            difference = model.head_rows(top[:, 0]) - model.head_rows(top[:, 1])
            sign = torch.from_numpy(signs.astype(np.float32)).to(device)[:, None]
            out[row, first : first + count] = sign * difference
        return out
