"""The byte budget of a model on a device, and how fast a file of a size decodes there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from math import floor

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.formats.profile import DeviceProfile

# limit -> (its name, what to do when it leaves nothing)
_LIMITS = {
    "ram": ("memory", "lower n_ctx or take a profile of a device with more memory"),
    "speed": ("the wanted speed", "lower wanted_tokens_per_s or n_ctx"),
    "share": (
        "the largest share of the F16 file",
        "check f16_file_bytes, or raise max_share_of_f16 in the profile",
    ),
}


@dataclass(frozen=True)
class ByteBudget:
    """What "ram", "speed" and "share" each leave for the largest GGUF file of a device, bytes."""

    limits: Mapping[str, int]

    @property
    def binding(self) -> str:
        """The smallest limit; on a tie the first of ram, speed, share."""
        return min(self.limits, key=self.limits.__getitem__)

    @property
    def bytes(self) -> int:
        return self.limits[self.binding]

    def explain(self) -> str:
        """One line: the budget, the three limits in MB (1e6 bytes), and which of them binds."""
        allowed = [f"{_LIMITS[name][0]} allows {_mb(size)}" for name, size in self.limits.items()]
        return f"budget {_mb(self.bytes)}, set by {_LIMITS[self.binding][0]} ({', '.join(allowed)})"


def byte_budget(
    profile: DeviceProfile,
    *,
    kv_bytes_per_token: int,
    compute_buffer_bytes: int,
    f16_file_bytes: int,
    n_ctx: int,
) -> ByteBudget:
    """The largest GGUF file for a device, the smallest of three limits.

    - ram: what memory leaves beside the profile's reserve, the KV cache of n_ctx tokens and
      llama.cpp's buffers.
    - speed: decoding a token reads every weight and the filled part of the KV cache once, and
      memory bandwidth limits it (Pope et al. 2022, arXiv:2211.05102; roofline model: Williams et
      al. 2009, doi:10.1145/1498765.1498785). The cache is half full on average.
    - share: the profile's largest share of the F16 file, a choice of this project.

    EdgeDtmError, with the numbers, when there is no room for any weights.
    """
    kv_bytes = n_ctx * kv_bytes_per_token
    # Exact arithmetic: floats would round byte counts above 2**53 and could pass a limit by one.
    speed = Fraction(profile.effective_bandwidth_bytes_per_s) / Fraction(
        profile.wanted_tokens_per_s
    )
    limits = {
        "ram": profile.ram_bytes - profile.reserve_bytes - kv_bytes - compute_buffer_bytes,
        "speed": floor(speed - Fraction(kv_bytes, 2)),
        "share": floor(Fraction(profile.max_share_of_f16) * f16_file_bytes),
    }
    if min(limits.values()) <= 0:
        raise EdgeDtmError(
            f"no room for a model on {profile.name}: memory leaves {_mb(limits['ram'])} "
            f"(RAM {_mb(profile.ram_bytes)}, reserve {_mb(profile.reserve_bytes)}, "
            f"KV cache {_mb(kv_bytes)} for {n_ctx} tokens, "
            f"buffers {_mb(compute_buffer_bytes)}), "
            f"{profile.wanted_tokens_per_s:g} tokens/s leave {_mb(limits['speed'])}, "
            f"the share of the F16 file leaves {_mb(limits['share'])}; "
            + "; ".join(_LIMITS[limit][1] for limit in limits if limits[limit] <= 0)
        )
    return ByteBudget(limits)


def estimate_decode_tokens_per_s(
    profile: DeviceProfile, file_bytes: int, kv_bytes_read: int = 0
) -> float:
    """Decoding speed in tokens per second: bandwidth over the bytes that one token reads.

    It takes the whole file as read once a token. That is too low for a model with an untied
    embedding table, of which one row a token is read, and too high where the kernels of a type,
    and not the memory, set the pace.
    """
    return profile.effective_bandwidth_bytes_per_s / (file_bytes + kv_bytes_read)


def _mb(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:,.1f} MB"
