"""What `structure` turns into ONNX: a module, example arguments, names, and the axes that vary.

May import: numpy, torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class GraphSpec:
    """One graph to export.

    module: what computes it, in eval mode.
    arguments: example arguments of its `forward`; a list is several inputs in one argument.
    inputs, outputs: names, in the order of arguments and results.
    varying: of each argument, {axis: its size's name}; a list where the argument is one.
    rows: {parameter of `module`: which rows of the model's own parameter it consists of}.
    """

    module: nn.Module
    arguments: tuple[Tensor | list[Tensor], ...]
    inputs: list[str]
    outputs: list[str]
    varying: tuple[object, ...]
    rows: dict[str, np.ndarray] = field(default_factory=dict)


def axis(name: str) -> torch.export.Dim:
    """A size that varies from call to call."""
    return torch.export.Dim(name, min=1, max=1 << 20)
