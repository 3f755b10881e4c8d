"""Which device does a name mean in this process, and does it exist?"""

from __future__ import annotations

from typing import Any

import torch

from zerocopy._store import object_store
from zerocopy.errors import DeviceError

CPU = torch.device("cpu")


def resolve(device: str | torch.device | None) -> torch.device:
    """The device that `device` means in this process. None means the CPU; `"auto"` the GPU that Ray assigned, else the CPU.

    Raises:
        DeviceError: the device does not exist.
    """
    if device is None:
        return CPU
    if device == "auto":
        device = "cuda:0" if object_store.assigned_gpu() else "cpu"
    _check_known(device)
    try:
        if torch.device(device).type == "meta":
            raise RuntimeError("it holds no data")
        return torch.empty(0, device=device).device  # with its full name: "cuda" and "cuda:0" may be the same device
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise DeviceError(
            f"This process has no device {str(device)!r}: {reason}.",
            hint="ask Ray for a GPU with num_gpus=1, and use device='auto': the GPU that Ray assigned, else the CPU.",
            device=str(device),
        ) from None


def _check_known(device: Any) -> None:
    """Refuse a name that is not a device on any machine, such as the name of a field."""
    if isinstance(device, int):  # for an int, torch looks for an accelerator at once
        return
    try:
        torch.device(device)
    except (RuntimeError, TypeError):
        raise DeviceError(
            f"device={device!r} is not a device that torch knows.",
            hint="use 'auto', 'cpu', or a name such as 'cuda:0'.",
            device=str(device),
        ) from None
