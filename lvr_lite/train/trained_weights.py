"""What was trained, weight by weight, so that a model of any size can be exported.

May import: torch, peft, bitsandbytes and what stands above `train`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from copy import copy
from typing import Any

import bitsandbytes.functional as bnb
import numpy as np
import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor

from lvr_lite.errors import BundleError
from lvr_lite.export.onnxfile import check_finite
from lvr_lite.export.weights import StoredWeights, empty_model, placeholder
from lvr_lite.model.checkpoint import Checkpoint
from lvr_lite.train.load import with_adapter


class TrainedWeights(Mapping[str, Tensor]):
    """The parameters that `load_merged` would have, bit for bit, each made when it is asked for.

    unmerged: leave the linears of the language model in NF4 as training had them; their adapters
        are then apart, as "….q_proj.lora_A" (r, in) and "….q_proj.lora_B" (out, r), the latter with
        the adapter's scale.
    model: their `empty_model`, for export.
    in_nf4: names of the weights that training held in 4 bits.

    Raises BundleError where base and adapter do not fit, or where the adapter cannot be merged
    layer by layer.
    """

    def __init__(self, checkpoint: Checkpoint, unmerged: bool = False) -> None:
        self.model = empty_model(checkpoint.config, checkpoint.processor.family)
        self.unmerged = unmerged
        self._checkpoint = checkpoint
        self._stored = StoredWeights(checkpoint, self.model)
        targets = re.compile(checkpoint.processor.family.lora_targets)
        linears = {
            name
            for name, module in self.model.named_modules()
            if isinstance(module, torch.nn.Linear) and targets.fullmatch(name)
        }
        in_four_bits = checkpoint.adapter or unmerged
        self.in_nf4 = {f"{name}.weight" for name in linears} if in_four_bits else set()
        self._layers: dict[str, Any] = {}
        self._rows: dict[str, tuple[list[int], Tensor]] = {}
        if checkpoint.adapter:
            self._read_adapter()

    def _read_adapter(self) -> None:
        checkpoint = self._checkpoint
        empty = empty_model(checkpoint.config, checkpoint.processor.family)
        tuned = with_adapter(empty, checkpoint)
        for path, module in tuned.get_base_model().named_modules():
            if isinstance(module, LoraLayer):
                bias = getattr(module, "lora_bias", {}).get("default")
                if module.use_dora.get("default") or bias:
                    raise BundleError(
                        f"{checkpoint.folder}: {path} is tuned with DoRA or a bias, "
                        "which export cannot merge; train plain LoRA"
                    )
                self._layers[f"{path}.weight"] = module
            elif isinstance(module, TrainableTokensLayer):
                # Tied tables share what they learned; the model's parameter has the name of the
                # layer that wraps this one.
                learned = module.trainable_tokens_delta["default"].detach().float()
                table = f"{path.removesuffix('.token_adapter')}.weight"
                self._rows[table] = (module.token_indices["default"], learned)
            elif isinstance(module, ModulesToSaveWrapper):
                raise BundleError(
                    f"{checkpoint.folder}: {path} was trained whole (modules_to_save), "
                    "which export cannot merge"
                )
        if self.unmerged:
            self._declare_adapters()

    def _declare_adapters(self) -> None:
        """The adapters as parameters of the empty model, so that export finds them."""
        number = len(dict(self.model.named_parameters()))
        for name, layer in self._layers.items():
            linear = self.model.get_submodule(name.removesuffix(".weight"))
            for part in ("lora_A", "lora_B"):
                shape = getattr(layer, part)["default"].weight.shape
                setattr(linear, part, placeholder(number, shape))
                number += 1

    def __iter__(self) -> Iterator[str]:
        return (name for name, _ in self.model.named_parameters(remove_duplicate=False))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    @torch.no_grad()
    def __getitem__(self, name: str) -> Tensor:
        path, _, part = name.rpartition(".")
        if part in ("lora_A", "lora_B"):
            layer = self._layers[f"{path}.weight"]
            weight: Tensor = getattr(layer, part)["default"].weight.detach().float()
            return weight * layer.scaling["default"] if part == "lora_B" else weight
        weight = self._stored[name]
        if name in self.in_nf4:
            weight = _unpacked(*_packed(weight, name)).reshape(weight.shape)
        if name in self._layers and not self.unmerged:
            weight += self._layers[name].get_delta_weight("default")
        if name in self._rows:
            rows, values = self._rows[name]
            weight[torch.tensor(rows)] = values
        return weight

    def merged(self) -> TrainedWeights:
        """The same with the adapter merged, to check against."""
        other = copy(self)
        other.unmerged = False
        return other

    def base(self) -> TrainedWeights:
        """The base's own weights: neither in 4 bits nor tuned."""
        other = self.merged()
        other.in_nf4 = set()
        other._layers = {}
        other._rows = {}
        return other

    def nf4(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """A linear's NF4 as bitsandbytes packs it, rows (out, in) one after another.

        Two values a byte (uint8), and the scale of each block of 64 (float32). The scales are those
        after double quantization, which training computed with.
        """
        packed, state = _packed(self._stored[name], name)
        scales = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
        return packed.numpy().reshape(-1), scales.float().numpy()


def _packed(weight: Tensor, name: str) -> tuple[Tensor, Any]:
    check_finite(name, weight.numpy())
    packed, state = bnb.quantize_4bit(
        weight, blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    return packed, state


def _unpacked(packed: Tensor, state: Any) -> Tensor:
    return torch.as_tensor(bnb.dequantize_4bit(packed, state)).float()
