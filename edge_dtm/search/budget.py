"""The byte budget of a model on a device. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.formats.profile import DeviceProfile

_BYTES_PER_MB = 1_000_000


Binding = Literal["ram", "speed", "share"]


@dataclass(frozen=True)
class ByteBudget:
    """The largest GGUF file a device should get, and the limits it comes from, all in bytes.

    Attributes:
        bytes: the budget, the smallest of the three limits.
        ram_limit_bytes: what fits in memory beside the system, the KV cache and the buffers.
        speed_limit_bytes: what can be read per token at the wanted speed.
        share_limit_bytes: the largest share of the F16 file.
        binding: which limit is the smallest; on a tie the first of ram, speed, share.
    """

    bytes: int
    ram_limit_bytes: int
    speed_limit_bytes: int
    share_limit_bytes: int
    binding: Binding

    def explain(self) -> str:
        """Return one line for people: the budget, the three limits in MB (1e6 bytes), which binds.

        Raises nothing.
        """
        label = {
            "ram": "memory",
            "speed": "the wanted speed",
            "share": "the largest share of the F16 file",
        }[self.binding]
        return (
            f"budget {_mb(self.bytes)}, set by {label} "
            f"(memory allows {_mb(self.ram_limit_bytes)}, "
            f"the wanted speed allows {_mb(self.speed_limit_bytes)}, "
            f"the largest share of the F16 file allows {_mb(self.share_limit_bytes)})"
        )


def byte_budget(
    profile: DeviceProfile,
    *,
    kv_bytes_per_token: int,
    compute_buffer_bytes: int,
    f16_file_bytes: int,
    n_ctx: int | None = None,
    wanted_tokens_per_s: float | None = None,
) -> ByteBudget:
    """Compute the largest GGUF file, in bytes, for a device.

    The budget is the smallest of three limits:

    * memory: ``ram - reserve - n_ctx * kv_bytes_per_token - compute_buffer``;
    * speed: ``bandwidth / wanted_tokens_per_s - kv_bytes_per_token * n_ctx / 2``. Decoding one
      token reads every weight and the filled part of the KV cache once, and memory bandwidth
      limits it (Pope et al. 2022, arXiv:2211.05102; roofline model: Williams et al. 2009,
      doi:10.1145/1498765.1498785). Half of ``n_ctx`` is the average fill while it grows from
      empty to full;
    * share: ``max_share_of_f16 * f16_file_bytes``, a choice of this project.

    Args:
        profile: the device.
        kv_bytes_per_token: KV cache of one token over all layers, bytes.
        compute_buffer_bytes: buffers of llama.cpp beside weights and KV cache, bytes.
        f16_file_bytes: size of the F16 GGUF file of the model, bytes.
        n_ctx: context length in tokens; the profile's when None.
        wanted_tokens_per_s: decoding speed in tokens per second; the profile's when None.

    Raises:
        EdgeDtmError: an argument out of range, or no room for any weights; with the numbers.
    """
    context_tokens = profile.n_ctx if n_ctx is None else n_ctx
    tokens_per_s = (
        profile.wanted_tokens_per_s if wanted_tokens_per_s is None else wanted_tokens_per_s
    )
    problems: list[str] = []
    if kv_bytes_per_token < 0:
        problems.append(f"kv_bytes_per_token is {kv_bytes_per_token}, needs to be 0 or more")
    if compute_buffer_bytes < 0:
        problems.append(f"compute_buffer_bytes is {compute_buffer_bytes}, needs to be 0 or more")
    if f16_file_bytes <= 0:
        problems.append(f"f16_file_bytes is {f16_file_bytes}, needs to be above 0")
    if context_tokens <= 0:
        problems.append(f"n_ctx is {context_tokens}, needs to be above 0")
    if not (math.isfinite(tokens_per_s) and tokens_per_s > 0):
        problems.append(f"wanted_tokens_per_s is {tokens_per_s}, needs to be above 0 and finite")
    if problems:
        raise EdgeDtmError(
            f"cannot compute a byte budget: {'; '.join(problems)}; correct these values"
        )

    kv_full_bytes = context_tokens * kv_bytes_per_token
    # Exact arithmetic: floats would round byte counts above 2**53 and could pass a limit by one.
    speed_bytes = Fraction(profile.effective_bandwidth_bytes_per_s) / Fraction(tokens_per_s)
    limits: dict[Binding, int] = {
        "ram": profile.ram_bytes - profile.reserve_bytes - kv_full_bytes - compute_buffer_bytes,
        "speed": math.floor(speed_bytes - Fraction(kv_full_bytes, 2)),
        "share": math.floor(Fraction(profile.max_share_of_f16) * f16_file_bytes),
    }
    binding = min(limits, key=lambda limit: limits[limit])
    if limits[binding] <= 0:
        remedies: dict[Binding, str] = {
            "ram": "lower n_ctx or take a profile of a device with more memory",
            "speed": "lower wanted_tokens_per_s or n_ctx",
            "share": "check f16_file_bytes, or raise max_share_of_f16 in the profile",
        }
        advice = "; ".join(remedies[limit] for limit in limits if limits[limit] <= 0)
        raise EdgeDtmError(
            f"no room for a model on {profile.name}: memory leaves {_mb(limits['ram'])} "
            f"(RAM {_mb(profile.ram_bytes)}, reserve {_mb(profile.reserve_bytes)}, "
            f"KV cache {_mb(kv_full_bytes)} for {context_tokens} tokens, "
            f"buffers {_mb(compute_buffer_bytes)}), "
            f"{tokens_per_s:g} tokens/s leave {_mb(limits['speed'])}, "
            f"the share of the F16 file leaves {_mb(limits['share'])}; {advice}"
        )
    return ByteBudget(
        bytes=limits[binding],
        ram_limit_bytes=limits["ram"],
        speed_limit_bytes=limits["speed"],
        share_limit_bytes=limits["share"],
        binding=binding,
    )


def estimate_decode_tokens_per_s(
    profile: DeviceProfile, file_bytes: int, kv_bytes_read: int = 0
) -> float:
    """Estimate the decoding speed in tokens per second: ``bandwidth / bytes read per token``.

    An estimate, not a measurement: it takes decoding as limited by memory bandwidth (Pope et al.
    2022, arXiv:2211.05102) and the whole file as read once per token. It is too low for a model
    with an untied embedding table, of which one row per token is read, and too high where the
    kernels of a type, and not the memory, set the pace.

    Args:
        profile: the device.
        file_bytes: size of the GGUF file, bytes.
        kv_bytes_read: bytes of KV cache read per token.

    Raises:
        EdgeDtmError: ``file_bytes`` not above 0 or ``kv_bytes_read`` below 0.
    """
    if file_bytes <= 0 or kv_bytes_read < 0:
        raise EdgeDtmError(
            f"cannot estimate the decoding speed of a file of {file_bytes} bytes with "
            f"{kv_bytes_read} bytes of KV cache read per token; "
            "give a file size above 0 and KV bytes of 0 or more"
        )
    return profile.effective_bandwidth_bytes_per_s / (file_bytes + kv_bytes_read)


def _mb(n_bytes: int) -> str:
    return f"{n_bytes / _BYTES_PER_MB:,.1f} MB"
