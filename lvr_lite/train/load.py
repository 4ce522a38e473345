"""Loading a model in 4 bits, and adapting it for training.

May import: torch, transformers, peft, bitsandbytes and what stands above `train`.

The language model's linear layers are held in NF4 with double quantization; vision tower,
projector, embedding and head stay as they are. This is checked on the loaded model, since a wrong
name in the skip list is silently ignored (docs/decisions.md).
"""

from __future__ import annotations

import os
import re
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError

from lvr_lite.config import Settings
from lvr_lite.errors import BundleError, LvrError
from lvr_lite.export.weights import PREFIXES, check_names
from lvr_lite.generate.kept_tokens import KeptTokens
from lvr_lite.generate.torch import language_model
from lvr_lite.model.checkpoint import ADAPTER, LVR_CONFIG, Checkpoint
from lvr_lite.model.processor_files import read_json, rows_of_tables
from lvr_lite.model.prompt import prompt_ids
from lvr_lite.model.weight_files import first_weights, tensors_of
from lvr_lite.train.marker_rows import keep_tables

# Parameters of a base that a CPU may hold without 4-bit storage.
SMALL = 10**9
# The tables that hold a row a token, where the head is not the embedding.
TABLES = ("embed_tokens", "lm_head")
# What a key of an adapter's file has before and after the path of the module that it adapts.
ADAPTED_MODULE = re.compile(
    r"^base_model\.model\.|\.(lora_|token_adapter|modules_to_save|trainable_tokens).*$"
)


def _load(checkpoint: Checkpoint, **how: Any) -> Any:
    """The base model, every tensor of which is one of its files'. how: to `from_pretrained`.

    Raises BundleError for weights that are missing, foreign, of another shape, or damaged.
    """
    check_names(checkpoint)
    architecture = getattr(transformers, checkpoint.processor.family.architecture)
    base = checkpoint.base
    try:
        config = architecture.config_class.from_pretrained(base)
        # transformers prefers model.safetensors to an index, and follows a name in config.json.
        config.transformers_weights = first_weights(base).name
        model, loaded = architecture.from_pretrained(
            base,
            config=config,
            use_safetensors=True,
            trust_remote_code=False,
            key_mapping=PREFIXES,
            output_loading_info=True,
            **how,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise BundleError(
            f"{base}: the weights cannot be loaded ({str(error).splitlines()[0]})"
        ) from error
    for fault, names in loaded.items():
        if names:
            raise BundleError(
                f"{base}: transformers loads it with {fault.replace('_', ' ')}, "
                f"first {min(map(str, names))}; copy the checkpoint again"
            )
    _grow_tables(model, checkpoint)
    return model.eval()


@torch.no_grad()
def _grow_tables(model: Any, checkpoint: Checkpoint) -> None:
    """Rows of 0 for markers that a full vocabulary has none for."""
    rows = rows_of_tables(checkpoint.config)
    before = len(model.get_input_embeddings().weight)
    if rows <= before:
        return
    model.resize_token_embeddings(rows, mean_resizing=False)
    model.get_input_embeddings().weight[before:] = 0
    model.get_output_embeddings().weight[before:] = 0


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
    keep_trainable_on_cpu(model)
    return model


def load_base(checkpoint: Checkpoint, dtype: torch.dtype, device: str, settings: Settings) -> Any:
    """The base model for stage 1, in 4 bits; unpacked where `unpacked_below` says so."""
    base = load_nf4(checkpoint, dtype, device)
    return base.dequantize() if base.num_parameters() < unpacked_below(device, settings) else base


def load_to_reinforce(
    checkpoint: Checkpoint, dtype: torch.dtype, device: str, settings: Settings
) -> Any:
    """A tuned model for stage 2: its adapter is trained on, without dropout, since the answers that
    are scored must be those that were drawn."""
    model = load_trained(checkpoint, dtype, device, unpacked_below(device, settings))
    return to_reinforce(model, settings)


def to_reinforce(model: Any, settings: Settings) -> Any:
    """A model with its adapter, ready for stage 2."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or "trainable_tokens" in name)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if settings.train.gradient_checkpointing:
        checkpoint_layers(model)
    return model


def kept_tokens(checkpoint: Checkpoint, settings: Settings) -> KeptTokens | None:
    """Where the visual tokens of the frozen tower are kept, if the settings ask for it; each of
    several processes has its share of the room.
    """
    limit = int(settings.train.cache_visual_tokens * 2**30)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    return KeptTokens(checkpoint, limit // processes) if limit else None


def unpacked_below(device: str, settings: Settings) -> int:
    """Parameters of a base below which its NF4 values are held unpacked in training: the same
    values, and without a GPU taking them apart costs a quarter of a step."""
    return SMALL if device == "cpu" and settings.train.dequantize == "auto" else 0


def adapted(model: Any, checkpoint: Checkpoint, settings: Settings) -> Any:
    """The model with LoRA on every linear layer of its language model and the three marker rows
    trainable, those of an untied head too; all else is frozen.

    Raises LvrError where anything else would be trained.
    """
    from peft import LoraConfig, get_peft_model

    for parameter in model.parameters():
        parameter.requires_grad_(False)
    family = checkpoint.processor.family
    tokens = checkpoint.processor.tokens
    markers = [tokens.lvr_start, tokens.lvr, tokens.lvr_end]
    config = LoraConfig(
        r=settings.lora.rank,
        lora_alpha=settings.lora.alpha,
        lora_dropout=settings.lora.dropout,
        target_modules=family.lora_targets,
        trainable_token_indices=markers if is_tied(model) else dict.fromkeys(TABLES, markers),
        task_type="CAUSAL_LM",
    )
    start_markers(model, checkpoint)
    # The adapters' random start.
    torch.manual_seed(settings.train.seed)
    tuned = get_peft_model(model, config)
    keep_tables(tuned)
    within = f".{family.language_model}."
    for name, parameter in tuned.named_parameters():
        of_adapter = "lora_" in name and within in name
        if not parameter.requires_grad:
            continue
        if not (of_adapter or "trainable_tokens" in name):
            raise LvrError(
                f"{name} would be trained, but only adapters and the three token rows may be"
            )
        # A gradient scaler refuses gradients in half precision.
        parameter.data = parameter.data.float()
    if settings.train.gradient_checkpointing:
        checkpoint_layers(tuned)
    return tuned


def checkpoint_layers(model: Any) -> None:
    """Gradient checkpointing for a model with adapters: the layers of its language model are
    computed again instead of kept. The vision tower is frozen, and keeps nothing.
    """
    language_model(model.get_base_model()).gradient_checkpointing_enable(
        gradient_checkpointing_kwargs={"use_reentrant": False}
    )


@torch.no_grad()
def start_markers(model: Any, checkpoint: Checkpoint) -> None:
    """Start the marker rows where the base model understands them; their spare rows were never
    trained.

    Both markers start as the prompt's last token, after which the model answers; the place of a
    latent starts as that of a visual token. An untied head's rows start alike: a frozen row would
    open the loop only by chance.
    """
    processor = checkpoint.processor
    image = processor.family.image_token
    prompt = prompt_ids(processor.tokenizer, processor.template, "", image, [image])
    tokens = processor.tokens
    last = prompt[-1]
    tables = [model.get_input_embeddings().weight]
    if not is_tied(model):
        tables.append(model.get_output_embeddings().weight)
    for rows in tables:
        rows[tokens.lvr_start] = rows[last]
        rows[tokens.lvr] = rows[tokens.image]
        rows[tokens.lvr_end] = rows[last]


def is_tied(model: Any) -> bool:
    """Whether head and embedding are one matrix."""
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def check_quantized(model: Any, checkpoint: Checkpoint) -> int:
    """The number of 4-bit linears. Raises BundleError where they are not exactly the linears of the
    language model."""
    import bitsandbytes as bnb

    targets = re.compile(checkpoint.processor.family.lora_targets)
    four_bit = set()
    wanted = set()
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            four_bit.add(name)
        if isinstance(module, torch.nn.Linear) and targets.fullmatch(name):
            wanted.add(name)
    if four_bit != wanted:
        wrong = min(four_bit ^ wanted)
        state = "is in 4 bits and should not be" if wrong in four_bit else "is not in 4 bits"
        raise BundleError(f"{checkpoint.base}: 4-bit loading went wrong: {wrong} {state}")
    return len(four_bit)


def keep_trainable_on_cpu(model: Any) -> None:
    """Forbid bitsandbytes to repack 4-bit weights.

    On CPUs with AVX512_BF16 one forward in eval mode would repack them, and training would then
    silently get no gradient.
    """
    import bitsandbytes as bnb

    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def load_trained(
    checkpoint: Checkpoint,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
    unpack_below: int = 0,
) -> Any:
    """What was trained, as it was trained: the 4-bit base with the adapter unmerged, where there is
    one.

    unpack_below: a base of fewer parameters holds the same NF4 values in `dtype`.
    """
    base = load_nf4(checkpoint, dtype, device)
    if base.num_parameters() < unpack_below:
        base = base.dequantize()
    return with_adapter(base, checkpoint).eval() if checkpoint.adapter else base


def load_merged(checkpoint: Checkpoint) -> Any:
    """One plain fp32 model: the adapter merged into the *dequantized* 4-bit base; a base checkpoint
    is loaded as it is.

    Merging into the 4-bit weights instead would cost 10.8 % logit error against 0.6 %.
    """
    if not checkpoint.adapter:
        return load_plain(checkpoint)
    model = load_nf4(checkpoint, torch.float32).dequantize()
    merged = with_adapter(model, checkpoint).merge_and_unload()
    return merged.float().eval()


def with_adapter(model: Any, checkpoint: Checkpoint) -> Any:
    """A base model with the adapter of a tuned checkpoint, unmerged. Raises BundleError where they
    do not fit."""
    from peft import PeftModel, get_peft_model_state_dict

    stored = _check_adapter(model, checkpoint)
    try:
        with warnings.catch_warnings():
            # An error below.
            warnings.filterwarnings("ignore", "Found missing adapter keys")
            tuned = PeftModel.from_pretrained(model, checkpoint.folder)
    # PEFT takes adapter_config.json as it comes, and raises whatever its values lead to.
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise BundleError(
            f"{checkpoint.folder}: the adapter does not fit its base {checkpoint.base} ({reason})"
        ) from error
    keep_tables(tuned)
    # PEFT starts what its file lacks at random, with a warning at most.
    wanted = set(get_peft_model_state_dict(tuned, save_embedding_layers=False))
    if missing := sorted(wanted - stored):
        raise BundleError(
            f"{checkpoint.folder / ADAPTER}: {len(missing)} weights of the adapter are missing "
            f"(first {missing[0]}); copy the checkpoint again"
        )
    return tuned


def _check_adapter(model: Any, checkpoint: Checkpoint) -> set[str]:
    """The names in an adapter's file. What it holds for layers that the base lacks, PEFT would pass
    over with a warning at most; over another base of the same shapes it computes nonsense.
    """
    stored = set(tensors_of(checkpoint.folder / ADAPTER))
    _refuse_other_kinds(checkpoint.folder, stored)
    modules = {name for name, _ in model.named_modules()}
    paths = {ADAPTED_MODULE.sub("", key) for key in stored}
    if foreign := sorted(path for path in paths if path not in modules):
        raise BundleError(
            f"{checkpoint.folder}: the adapter is of another base than {checkpoint.base}, "
            f"which has no {foreign[0]}"
        )
    if checkpoint.trained_over not in (None, checkpoint.base_sha256):
        raise BundleError(
            f"{checkpoint.folder}: the adapter is of another base than {checkpoint.base}, "
            "whose weights have another sha256; "
            f"name the one that it was trained over as `base` in {LVR_CONFIG}"
        )
    return stored


def _refuse_other_kinds(folder: Path, stored: set[str]) -> None:
    """Raises BundleError for an adapter that holds more than LoRA on linear layers and marker rows:
    such weights would be passed over, or could not be merged layer by layer.
    """
    config = read_json(folder / "adapter_config.json")
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        _refuse_kind(folder, f"is {kind}, not LoRA")
    if config.get("modules_to_save"):
        names = ", ".join(map(str, config["modules_to_save"]))
        _refuse_kind(folder, f"holds {names} trained whole (modules_to_save)")
    if config.get("bias", "none") != "none":
        _refuse_kind(folder, f"holds trained biases (bias: {config['bias']})")
    for key in sorted(stored):
        path = ADAPTED_MODULE.sub("", key)
        if "lora_embedding_" in key or path.endswith((".embed_tokens", "lm_head")):
            if "trainable_tokens" not in key:
                _refuse_kind(folder, f"adapts the embedding or the head ({key})")
        elif path.endswith((".weight", ".bias")):
            _refuse_kind(folder, f"holds {path} itself, trained whole")


def _refuse_kind(folder: Path, what: str) -> None:
    raise BundleError(
        f"{folder}: its adapter {what}; here adapters are LoRA on linear layers of the language "
        "model: merge it into its base (peft: merge_and_unload) and give the result as a base"
    )
