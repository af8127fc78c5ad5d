"""Where a run computes: device, precision, the ranks of torchrun, and means over them."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from common import fail
from common.shards import RANK, WORLD


def usable(device: str) -> torch.device:
    """The device of that name; one that can not be used here is refused in one line."""
    try:
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        fail(f"--device {device} can not be used: {str(error).splitlines()[0]}")
    return torch.device(device)


def pick_device(wanted: str, precision: str) -> tuple[torch.device, torch.dtype]:
    """Device and precision (DETAIL 12), printed with their reasons; joins the ranks of torchrun."""
    reason = "--device"
    if wanted == "auto" and torch.cuda.is_available():
        wanted, reason = "cuda", "a CUDA device is here"
    elif wanted == "auto":
        wanted, reason = "cpu", "no GPU found"
    if wanted == "cuda" and WORLD > 1:
        wanted = f"cuda:{os.environ['LOCAL_RANK']}"
    device = usable(wanted)
    if device.type == "cpu":  # flash attention's gradient is slow there; this switch is not CUDA's alone
        torch.backends.cuda.enable_flash_sdp(False)

    why = "--dtype"
    if precision == "auto" and has_bfloat16(device):
        precision, why = "bfloat16", "the hardware has it"
    elif precision == "auto":
        precision, why = "float32", "the hardware has no bfloat16"
    if RANK == 0:
        threads = torch.get_num_threads()
        print(f"device {device} ({reason}), {precision} ({why}), {threads} CPU threads")

    if WORLD > 1:
        backend = "gloo"
        if device.type == "cuda":
            torch.cuda.set_device(device)
            backend = "nccl"
        dist.init_process_group(backend, timeout=timedelta(hours=2))  # rank 0 probes while others wait
    return device, getattr(torch, precision)


def has_bfloat16(device: torch.device) -> bool:
    """Whether the hardware computes in bfloat16; elsewhere it is emulated, and slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def average_gradients(module: nn.Module) -> None:
    """Replaces each gradient by its mean over the ranks; does nothing in a single process."""
    if WORLD == 1:
        return
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= WORLD
    sizes = [gradient.numel() for gradient in gradients]
    for gradient, mean in zip(gradients, flat.split(sizes)):
        gradient.copy_(mean.view_as(gradient))


def mean_over_ranks(value: Tensor) -> Tensor:
    """Mean of a tensor over the ranks, without a gradient."""
    if WORLD == 1:
        return value
    value = value.detach().clone()
    dist.all_reduce(value)
    return value / WORLD


def from_rank_0(value: Tensor) -> Tensor:
    """The first rank's tensor, on all of them."""
    if WORLD > 1:
        value = value.contiguous()
        dist.broadcast(value, 0)
    return value


class Means:
    """Next row of metrics: tensors' means over updates and ranks, plain values as they were logged last."""

    def __init__(self):
        self.sums, self.counts, self.plain = {}, {}, {}

    def add(self, values: dict[str, Tensor | float | list | None]) -> None:
        """What one update logged."""
        for name, value in values.items():
            if isinstance(value, Tensor):
                self.sums[name] = self.sums.get(name, 0) + value.detach()
                self.counts[name] = self.counts.get(name, 0) + 1
            else:
                self.plain[name] = value

    def take(self) -> dict[str, float | list | None]:
        """The row; the next one starts empty."""
        row = {name: float(mean_over_ranks(total)) / self.counts[name] for name, total in self.sums.items()}
        row |= self.plain
        self.sums, self.counts, self.plain = {}, {}, {}
        return row
