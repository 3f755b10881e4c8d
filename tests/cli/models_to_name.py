"""Which models of a user do the commands name, as `models_to_name:build`? Workers import this module too."""

from __future__ import annotations

import torch
from torch import nn


class Stack(nn.Module):
    """A model with two dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(512, 512), nn.Linear(512, 512).half()


def build() -> Stack:
    print("this is no result")
    torch.manual_seed(0)
    return Stack()


def layers() -> nn.Module:
    return nn.Sequential(*[nn.Linear(1500, 1500) for _ in range(6)])


def batch() -> torch.Tensor:
    return torch.ones(2, 1500)


def broken() -> nn.Module:
    raise ValueError("no weights here")


def wants(size: int) -> nn.Module:
    return nn.Linear(size, size)


number = 5
instance = nn.Linear(4, 4)
