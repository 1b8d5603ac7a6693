"""A checkpoint that computes: its blocks one at a time in float32, whatever the model's size.

Weights stay in the checkpoint's own type, mapped from its files or, where they fit, on the GPU.
Turning float16 and bfloat16 into float32 is exact, so that where they lie changes no result.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from edge_dtm.core.machine import total_bytes
from edge_dtm.host.checkpoint.checkpoint import Checkpoint
from edge_dtm.host.checkpoint.decoder import (
    Block,
    Rotation,
    inverse_frequencies,
    rms_norm,
    rotation,
    run_block,
)
from edge_dtm.host.checkpoint.sequences import batches_by_length, padded

KEPT_SHARE = 0.2  # of the memory: below it float32 blocks stay between two uses
OWN_SHARE = 0.6  # below it the weights stay on a GPU in their own 16 bits
HEAD_ROWS = 16_384  # of the head that are float32 at a time
BATCH_TOKENS = 2048  # padding included; bounds the memory of a forward pass


class Llama:
    """`checkpoint` on `device`.

    All values are float32 and exactly the checkpoint's. Nothing here is trained.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device) -> None:
        self.checkpoint, self.config, self.device = checkpoint, checkpoint.config, device
        weights = sum(c.weights for c in checkpoint.components())
        self._keep_float32 = keeps_float32(weights, device)
        self._keep_own = device.type == "cuda" and 2 * weights <= OWN_SHARE * memory_bytes(device)
        self._blocks: dict[int, Block] = {}
        self._own: dict[str, torch.Tensor] = {}
        self._float32: dict[str, torch.Tensor] = {}
        self._buffers: dict[str, torch.Tensor] = {}
        self._frequencies = inverse_frequencies(self.config).to(device)
        self._names = _block_tensors(checkpoint)

    @property
    def layers(self) -> int:
        return self.config.layers

    def block(self, layer: int) -> Block:
        """The block's tensors, valid until another block is asked for."""
        if layer in self._blocks:
            return self._blocks[layer]
        prefix = f"blk.{layer}."
        own = {n: self._read(prefix + n) for n in self._names[layer]}
        if self._keep_float32:
            self._blocks[layer] = Block(self.config, {n: t.float() for n, t in own.items()})
            return self._blocks[layer]
        for name, tensor in own.items():
            if name not in self._buffers:  # reused, since fresh memory costs as much as the copy
                self._buffers[name] = torch.empty(tensor.shape, device=self.device)
            self._buffers[name].copy_(tensor)
        return Block(self.config, self._buffers)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """int64 (...) -> float32 (..., hidden)."""
        return self._table("token_embd.weight")[ids].float()

    def norm(self, hidden: torch.Tensor) -> torch.Tensor:
        """The last norm: what the head reads, the shape of `hidden`."""
        return rms_norm(hidden, self._table("output_norm.weight").float(), self.config.rms_epsilon)

    def head_rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows of the head, int64 (...) -> float32 (..., hidden)."""
        return self._table(self._head_name)[ids].float()

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """From the last norm's output, float32 (..., hidden) -> (..., vocab)."""
        head = self._table(self._head_name)
        if self._keep_float32:
            if head.dtype != torch.float32:
                head = self._float32.setdefault(self._head_name, head.float())
            return hidden @ head.T
        parts = [
            hidden @ head[start : start + HEAD_ROWS].float().T
            for start in range(0, len(head), HEAD_ROWS)
        ]
        return torch.cat(parts, dim=-1)

    def turn(self, positions: torch.Tensor) -> Rotation:
        """See `decoder.rotation`. positions: int64 (sequences or 1, tokens)."""
        return rotation(self._frequencies, positions)

    @torch.no_grad()
    def final_hidden(self, sequences: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """What the head reads at every token: one (tokens, hidden) a sequence. Every block is read
        once, all sequences side by side."""
        lengths = [len(s) for s in sequences]
        order = sorted(range(len(sequences)), key=lambda i: (lengths[i], i))
        batches = batches_by_length(lengths, order, BATCH_TOKENS)
        states = [
            self.embed(padded([sequences[i] for i in batch]).to(self.device)) for batch in batches
        ]
        for layer in range(self.layers):
            block = self.block(layer)
            for k, hidden in enumerate(states):
                positions = torch.arange(hidden.shape[1], device=self.device)[None]
                states[k] = run_block(block, hidden, self.turn(positions))
        out: list[torch.Tensor] = [torch.empty(0)] * len(sequences)
        for batch, hidden in zip(batches, states, strict=True):
            for row, i in enumerate(batch):
                out[i] = self.norm(hidden[row, : lengths[i]])
        return out

    @property
    def _head_name(self) -> str:
        return "token_embd.weight" if self.config.tied else "output.weight"

    def _table(self, name: str) -> torch.Tensor:
        """A tensor outside the blocks, in its own type."""
        if name not in self._own:
            self._own[name] = self.checkpoint.torch_tensor(name).to(self.device)
        return self._own[name]

    def _read(self, name: str) -> torch.Tensor:
        """A block's tensor on the device, in its own type."""
        if name in self._own:
            return self._own[name]
        tensor = self.checkpoint.torch_tensor(name).to(self.device)
        if self._keep_own and not self._keep_float32 and tensor.dtype != torch.float32:
            self._own[name] = tensor
        return tensor


def memory_bytes(device: torch.device) -> int:
    """Of the memory that tensors on the device take, free or not."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    return total_bytes()


def keeps_float32(weights: int, device: torch.device) -> bool:
    """Whether so many weights stay in float32 between two uses."""
    return 4 * weights <= KEPT_SHARE * memory_bytes(device)


def _block_tensors(checkpoint: Checkpoint) -> list[list[str]]:
    """For each block the names of its tensors, without `blk.N.`."""
    names: Iterable[str] = [
        *(c.name + ".weight" for c in checkpoint.components()),
        *(name for name, _ in checkpoint.vectors()),
    ]
    out: list[list[str]] = [[] for _ in range(checkpoint.config.layers)]
    for name in names:
        if name.startswith("blk."):
            _, layer, rest = name.split(".", 2)
            out[int(layer)].append(rest)
    return out
