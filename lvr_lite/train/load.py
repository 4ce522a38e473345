"""Loading a model in 4 bits to train over it, and merging what was trained. May import: torch,
transformers, peft, bitsandbytes, the core.

NF4 with double quantization for the language model's linear layers; vision tower, projector,
embedding and head stay as they are, which is checked on the loaded model, since a wrong name in the
skip list is silently ignored (docs/decisions.md).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from copy import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lvr_lite.errors import BundleError
from lvr_lite.export.onnxfile import check_finite
from lvr_lite.export.weights import StoredWeights, empty_model, placeholder
from lvr_lite.model.checkpoint import LVR_CONFIG, Checkpoint


def _model_class(checkpoint: Checkpoint) -> Any:
    import transformers

    return getattr(transformers, checkpoint.processor.family.architecture)


def _load(checkpoint: Checkpoint, **how: Any) -> Any:
    try:
        model = _model_class(checkpoint).from_pretrained(
            checkpoint.base, use_safetensors=True, trust_remote_code=False, **how
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise BundleError(
            f"{checkpoint.base}: the weights cannot be loaded ({str(error).splitlines()[0]})"
        ) from error
    return model.eval()


def load_plain(
    checkpoint: Checkpoint, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Any:
    """The base model without quantization."""
    return _load(checkpoint, dtype=dtype, device_map={"": device})


def load_nf4(
    checkpoint: Checkpoint, dtype: torch.dtype = torch.bfloat16, device: str = "cpu"
) -> Any:
    """The base model with its language model's linears in NF4; the rest and the arithmetic in
    `dtype`.

    Raises BundleError where something else was quantized, or nothing.
    """
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=list(checkpoint.processor.family.keep_unquantized),
    )
    model = _load(checkpoint, dtype=dtype, device_map={"": device}, quantization_config=config)
    check_quantized(model, checkpoint)
    return model


def check_quantized(model: Any, checkpoint: Checkpoint) -> int:
    """The number of 4-bit linears, all of them in the language model and all of its linears among
    them; keeps them trainable on CPUs.
    """
    import bitsandbytes as bnb

    four_bit = {
        name for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)
    }
    linears = {
        n
        for n, m in model.named_modules()
        if isinstance(m, torch.nn.Linear)
        and re.fullmatch(checkpoint.processor.family.lora_targets, n)
    }
    if four_bit != linears:
        wrong = sorted(four_bit ^ linears)
        raise BundleError(
            f"{checkpoint.base}: 4-bit loading went wrong: {wrong[0]} is, or is not, in 4 bits against the plan"
        )
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            # One eval forward would repack the weights on CPUs with AVX512_BF16, and training would
            # then silently get no gradient.
            module.support_avx512bf16_for_cpu = False
    return len(four_bit)


def load_trained(
    checkpoint: Checkpoint,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
    unpacked_below: int = 0,
) -> Any:
    """What was trained, as it was trained: the 4-bit base with the adapter unmerged, where there is
    one. A base of fewer parameters than `unpacked_below` holds the same NF4 values in `dtype`,
    which is faster without a GPU.
    """
    base = load_nf4(checkpoint, dtype, device)
    if base.num_parameters() < unpacked_below:
        base = base.dequantize()
    return _with_adapter(base, checkpoint).eval() if checkpoint.adapter else base


def load_merged(checkpoint: Checkpoint) -> Any:
    """One plain fp32 model: the adapter merged into the *dequantized* 4-bit base; a base checkpoint
    is loaded as it is.

    Merging into the 4-bit weights instead would cost 10.8 % logit error against 0.6 % (FACTS).
    """
    if not checkpoint.adapter:
        return load_plain(checkpoint)
    model = load_nf4(checkpoint, torch.float32).dequantize()
    merged = _with_adapter(model, checkpoint).merge_and_unload()
    return merged.float().eval()


def _with_adapter(model: Any, checkpoint: Checkpoint) -> Any:
    from peft import PeftModel

    _check_adapter(model, checkpoint)
    try:
        return PeftModel.from_pretrained(model, checkpoint.folder)
    except (ValueError, RuntimeError, KeyError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise BundleError(
            f"{checkpoint.folder}: the adapter does not fit its base {checkpoint.base} ({reason})"
        ) from error


def _check_adapter(model: Any, checkpoint: Checkpoint) -> None:
    """What an adapter holds for layers that the base lacks, PEFT would pass over with a warning at
    most; over another base of the same shapes it computes nonsense.
    """
    from safetensors import SafetensorError, safe_open

    file = checkpoint.folder / "adapter_model.safetensors"
    modules = {name for name, _ in model.named_modules()}
    try:
        with safe_open(str(file), "pt") as opened:
            paths = {
                re.sub(
                    r"^base_model\.model\.|\.(lora_|token_adapter|modules_to_save|trainable_tokens).*$",
                    "",
                    key,
                )
                for key in list(opened.keys())
            }
    except (SafetensorError, OSError) as error:
        raise BundleError(
            f"{file}: truncated, or not a safetensors file ({str(error).splitlines()[0]})"
        ) from error
    if foreign := sorted(path for path in paths if path not in modules):
        raise BundleError(
            f"{checkpoint.folder}: the adapter is of another base than {checkpoint.base}, which has no {foreign[0]}"
        )
    if checkpoint.trained_over not in (None, checkpoint.base_sha256):
        raise BundleError(
            f"{checkpoint.folder}: the adapter is of another base than {checkpoint.base}, whose weights have another sha256; "
            f"name the one that it was trained over as `base` in {LVR_CONFIG}"
        )


class TrainedWeights(Mapping[str, Tensor]):
    """The parameters that `load_merged` would have, bit for bit, each made when it is asked for.

    unmerged: the linears of the language model in NF4 as training had them, their adapters apart,
    as "….q_proj.lora_A" (r, in) and "….q_proj.lora_B" (out, r), the latter with the adapter's
    scale. model: their `empty_model`, for export. Raises BundleError where base and adapter do not
    fit, or where the adapter cannot be merged layer by layer.
    """

    def __init__(self, checkpoint: Checkpoint, unmerged: bool = False) -> None:
        self.model = empty_model(checkpoint.config, checkpoint.processor.family)
        self.unmerged, self._checkpoint = unmerged, checkpoint
        self._stored = StoredWeights(checkpoint, self.model)
        targets = re.compile(checkpoint.processor.family.lora_targets)
        linears = {
            name
            for name, module in self.model.named_modules()
            if isinstance(module, torch.nn.Linear) and targets.fullmatch(name)
        }
        self.in_nf4 = (
            {f"{name}.weight" for name in linears} if checkpoint.adapter or unmerged else set()
        )
        self._layers: dict[str, Any] = {}
        self._rows: dict[str, tuple[list[int], Tensor]] = {}
        if checkpoint.adapter:
            self._read_adapter()

    def _read_adapter(self) -> None:
        from peft.tuners.lora import LoraLayer
        from peft.tuners.trainable_tokens import TrainableTokensLayer
        from peft.utils import ModulesToSaveWrapper

        tuned = _with_adapter(
            empty_model(self._checkpoint.config, self._checkpoint.processor.family),
            self._checkpoint,
        )
        for path, module in tuned.get_base_model().named_modules():
            if isinstance(module, LoraLayer):
                if module.use_dora.get("default") or getattr(module, "lora_bias", {}).get(
                    "default"
                ):
                    raise BundleError(
                        f"{self._checkpoint.folder}: {path} is tuned with DoRA or a bias, which export cannot merge; train plain LoRA"
                    )
                self._layers[f"{path}.weight"] = module
            elif isinstance(module, TrainableTokensLayer):
                # tied ones share what they learned; the model's parameter has the name of the layer
                # that wraps this one
                learned = module.trainable_tokens_delta["default"].detach().float()
                self._rows[f"{path.removesuffix('.token_adapter')}.weight"] = (
                    module.token_indices["default"],
                    learned,
                )
            elif isinstance(module, ModulesToSaveWrapper):
                raise BundleError(
                    f"{self._checkpoint.folder}: {path} was trained whole (modules_to_save), which export cannot merge"
                )
        if self.unmerged:
            self._declare_adapters()

    def _declare_adapters(self) -> None:
        """The adapters as parameters of the empty model, so that export finds them."""
        made = len(dict(self.model.named_parameters()))
        for name, layer in self._layers.items():
            linear = self.model.get_submodule(name.removesuffix(".weight"))
            for part, shape in (
                ("lora_A", layer.lora_A["default"].weight.shape),
                ("lora_B", layer.lora_B["default"].weight.shape),
            ):
                setattr(linear, part, placeholder(made, shape))
                made += 1

    def __iter__(self) -> Iterator[str]:
        return (name for name, _ in self.model.named_parameters(remove_duplicate=False))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    @torch.no_grad()
    def __getitem__(self, name: str) -> Tensor:
        path, _, part = name.rpartition(".")
        if part in ("lora_A", "lora_B"):
            layer = self._layers[f"{path}.weight"]
            weight = getattr(layer, part)["default"].weight.detach().float()
            return torch.as_tensor(
                weight * layer.scaling["default"] if part == "lora_B" else weight
            )
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

    def nf4(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """A linear's NF4 as bitsandbytes packs it: two values a byte (uint8), and the scale of each
        block of 64 (float32), rows (out, in) one after another. The scales are those after double
        quantization, which training computed with.
        """
        packed, state = _packed(self._stored[name], name)
        import bitsandbytes.functional as bnb

        scales = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
        return packed.numpy().reshape(-1), scales.float().numpy()


def _packed(weight: Tensor, name: str) -> tuple[Tensor, Any]:
    import bitsandbytes.functional as bnb

    check_finite(name, weight.numpy())
    packed, state = bnb.quantize_4bit(
        weight, blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    return packed, state


def _unpacked(packed: Tensor, state: Any) -> Tensor:
    import bitsandbytes.functional as bnb

    return torch.as_tensor(bnb.dequantize_4bit(packed, state)).float()
