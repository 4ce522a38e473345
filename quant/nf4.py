"""Loading a model in 4 bits to train over it, and merging what was trained. May import: torch, transformers, peft, bitsandbytes, the core.

NF4 with double quantization for the language model's linear layers; vision tower, projector, embedding and head stay as they are,
which is checked on the loaded model, since a wrong name in the skip list is silently ignored (docs/decisions.md).
"""

from __future__ import annotations

from typing import Any

import torch

from lvr_lite.checkpoint import Checkpoint
from lvr_lite.errors import BundleError


def _model_class(checkpoint: Checkpoint) -> Any:
    import transformers

    return getattr(transformers, checkpoint.family.ARCHITECTURE)


def _load(checkpoint: Checkpoint, **how: Any) -> Any:
    try:
        model = _model_class(checkpoint).from_pretrained(checkpoint.base, use_safetensors=True, trust_remote_code=False, **how)
    except (OSError, ValueError, RuntimeError) as error:
        raise BundleError(f"{checkpoint.base}: the weights cannot be loaded ({str(error).splitlines()[0]})") from error
    return model.eval()


def load_plain(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
    """The base model without quantization."""
    return _load(checkpoint, dtype=dtype, device_map={"": device})


def load_nf4(checkpoint: Checkpoint, dtype: torch.dtype = torch.bfloat16, device: str = "cpu") -> Any:
    """The base model with its language model's linears in NF4; the rest and the arithmetic in `dtype`.

    Raises BundleError where something else was quantized, or nothing.
    """
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=list(checkpoint.family.KEEP_UNQUANTIZED),
    )
    model = _load(checkpoint, dtype=dtype, device_map={"": device}, quantization_config=config)
    check_quantized(model, checkpoint)
    return model


def check_quantized(model: Any, checkpoint: Checkpoint) -> int:
    """The number of 4-bit linears, all of them in the language model and all of its linears among them; keeps them trainable on CPUs."""
    import re

    import bitsandbytes as bnb

    four_bit = {name for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
    linears = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and re.fullmatch(checkpoint.family.LORA_TARGETS, n)}
    if four_bit != linears:
        wrong = sorted(four_bit ^ linears)
        raise BundleError(f"{checkpoint.base}: 4-bit loading went wrong: {wrong[0]} is, or is not, in 4 bits against the plan")
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            # One eval forward would repack the weights on CPUs with AVX512_BF16, and training would then silently get no gradient.
            module.support_avx512bf16_for_cpu = False
    return len(four_bit)


def load_trained(checkpoint: Checkpoint, dtype: torch.dtype = torch.bfloat16, device: str = "cpu") -> Any:
    """What was trained, as it was trained: the 4-bit base with the adapter unmerged."""
    return _with_adapter(load_nf4(checkpoint, dtype, device), checkpoint).eval()


def load_merged(checkpoint: Checkpoint) -> Any:
    """One plain fp32 model: the adapter merged into the *dequantized* 4-bit base; a base checkpoint is loaded as it is.

    Merging into the 4-bit weights instead would cost 10.8 % logit error against 0.6 % (FACTS).
    """
    if not checkpoint.adapter:
        return load_plain(checkpoint)
    model = load_nf4(checkpoint, torch.float32).dequantize()
    merged = _with_adapter(model, checkpoint).merge_and_unload()
    return merged.float().eval()


def _with_adapter(model: Any, checkpoint: Checkpoint) -> Any:
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(model, checkpoint.folder)
    except (ValueError, RuntimeError, KeyError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise BundleError(f"{checkpoint.folder}: the adapter does not fit its base {checkpoint.base} ({reason})") from error
