"""Sequences of token ids side by side."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from edge_dtm.formats.reference import Reference


def reference_sequences(reference: Reference) -> list[list[int]]:
    """Prompt and answer of every row without the last id: nothing was generated behind it."""
    return [
        (reference.prompt(row) + reference.generated(row))[:-1] for row in range(len(reference))
    ]


def batches_by_length(lengths: Sequence[int], order: Iterable[int], tokens: int) -> list[list[int]]:
    """Cut sequences, taken in `order` (of rising length), into batches of at most `tokens`,
    padding included; a longer sequence is a batch of its own."""
    batches: list[list[int]] = []
    for index in order:
        if batches and (len(batches[-1]) + 1) * lengths[index] <= tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def padded(sequences: Sequence[Sequence[int]]) -> torch.Tensor:
    """int64 (sequences, longest). Padding stands to the right, where causal attention never looks
    back from; its id is 0."""
    rows = [torch.tensor(ids) for ids in sequences]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
