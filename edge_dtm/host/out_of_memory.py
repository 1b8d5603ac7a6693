"""What happens when memory runs out after all: less at a time, else one line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from edge_dtm.core.errors import EdgeDtmError

T = TypeVar("T")


def is_out_of_memory(error: BaseException) -> bool:
    """Of a GPU, or of the CPU, which torch reports as a plain RuntimeError."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def with_less_at_a_time(work: Callable[[int], T], most: int, least: int) -> T:
    """work(amount) with `most`, then with half as much as long as memory runs out, down to `least`."""
    amount = most
    while True:
        try:
            return work(amount)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or amount <= least:
                raise
        amount = max(least, amount // 2)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


@contextmanager
def out_of_memory_in_words(device: str) -> Iterator[None]:
    """EdgeDtmError in the place of torch's many lines."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        remedy = (
            "close other programs, use fewer --workers, or shorter --prompts and fewer --tokens"
        )
        if device != "cpu":
            remedy += ", or --device cpu"
        line = (str(error).splitlines() or ["no memory"])[0]
        raise EdgeDtmError(
            f"the memory of {device} is too small ({line}): {remedy}; what was done is kept"
        ) from None
