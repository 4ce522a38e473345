"""A checkpoint's weights one at a time, so that a model of any size fits.

May import: torch, transformers, accelerate, safetensors, model/.

    model = empty_model(checkpoint.config, checkpoint.processor.family)
    weights = StoredWeights(checkpoint, model)
    weights["model.visual.blocks.0.mlp.down_proj.weight"]       # float32, read from its file now

The way of a weight from safetensors to ONNX:

    empty_model            the model with a code (a NaN) in the place of each parameter's values
    graphs.structure       its graphs, exported; the codes in them tell which weight is which
    StoredWeights          the values, read from their files by the parameter's name
    write.write_bundle     puts the values into the graphs, one weight at a time

Names are those of transformers' parameters, whatever the files call them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lvr_lite.errors import BundleError
from lvr_lite.files import JsonObject
from lvr_lite.model.checkpoint import Checkpoint
from lvr_lite.model.families import Family
from lvr_lite.model.processor_files import MARKERS
from lvr_lite.model.weight_files import (
    StoredTensor,
    refuse_quantized_tensor,
    same_values,
    stored_tensors,
)

# The first code: a float32 NaN that is signaling, with 22 bits free to number parameters. Any
# arithmetic makes a signaling NaN quiet, so a surviving pattern proves that the weight was used
# unchanged.
FIRST_CODE = 0x7F800001
# What tools put before or into the names of weights, and what is to stand in its place: DDP,
# torch.compile, and PEFT around a whole model and around one layer. As transformers'
# `from_pretrained(key_mapping=…)` takes them.
PREFIXES = {
    r"^module\.": "",
    r"^_orig_mod\.": "",
    r"^base_model\.model\.": "",
    r"\.base_layer\.": ".",
}
# A model of transformers or a module in it: which attributes it has depends on its class, and none
# has a type.
TransformersModule = Any


def empty_model(config: JsonObject, family: Family) -> TransformersModule:
    """The model of a config.json, with parameters of the right shapes in no memory: each is a
    single NaN, expanded to its shape.

    Which NaN tells the parameter (`origins`), through views, transpositions and export. Buffers are
    real. Raises BundleError where transformers cannot make such a model.
    """
    model = model_on_meta(config, family)
    # By the identity of the parameter that they replace, so that tied ones stay tied.
    placeholders: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            key = id(parameter)
            if key not in placeholders:
                placeholders[key] = placeholder(len(placeholders), parameter.shape)
            setattr(module, name, placeholders[key])
    return model.eval()


def model_on_meta(config: JsonObject, family: Family) -> TransformersModule:
    """The model of a config.json with its parameters on the meta device, tied ones tied, and real
    buffers. Raises BundleError where transformers cannot make it.
    """
    import transformers
    from accelerate import init_empty_weights

    architecture = getattr(transformers, family.architecture)
    values = {key: value for key, value in config.items() if key != "model_type"}
    try:
        with init_empty_weights(include_buffers=False):
            model = architecture(architecture.config_class(**values))
    # A config.json may hold anything, and transformers raises whatever that leads to.
    except Exception as error:
        raise BundleError(
            f"config.json: transformers cannot make a {family.model_type} of it "
            f"({_first_line(error)})"
        ) from error
    model.tie_weights()
    return model


def placeholder(number: int, shape: Sequence[int]) -> nn.Parameter:
    """A parameter in no memory, which tells its number (`code_of`)."""
    code = torch.tensor([FIRST_CODE + number], dtype=torch.int32).view(torch.float32)
    return nn.Parameter(code.expand(tuple(shape)), requires_grad=False)


def origins(model: nn.Module) -> dict[int, str]:
    """{code: parameter} of an empty model; of tied parameters the first."""
    named = list(model.named_parameters(remove_duplicate=False))
    return {code_of(parameter): name for name, parameter in reversed(named)}


def code_of(tensor: Tensor) -> int:
    """The code in a parameter of an empty model, and in any view of it."""
    return int(tensor.detach().flatten()[0].view(torch.int32))


class Weights(Protocol):
    """A model's parameters by their names, float32 on the CPU, each made when it is asked for.

    model: the model's `empty_model`, which export uses up.
    """

    model: TransformersModule

    def __getitem__(self, name: str) -> Tensor: ...

    def merged(self) -> Weights:
        """The same with its adapters merged."""
        ...

    def base(self) -> Weights:
        """The same without adapters, as the base's files hold them."""
        ...


class StoredWeights(Mapping[str, Tensor]):
    """The parameters of a checkpoint's base model, float32 on the CPU, each read from its file when
    it is asked for.
    """

    def __init__(self, checkpoint: Checkpoint, model: nn.Module) -> None:
        """model: its `empty_model`.

        Raises BundleError where names or shapes are not those of the model to the last tensor.
        """
        named = list(model.named_parameters(remove_duplicate=False))
        self.shapes = {name: tuple(parameter.shape) for name, parameter in named}
        self._places = account(checkpoint.base, model)
        # Of tied parameters, files hold one.
        stored = [(name, p) for name, p in reversed(named) if name in self._places]
        tied = {id(p): self._places[name] for name, p in stored}
        for name, parameter in named:
            if name not in self._places:
                self._places[name] = tied[id(parameter)]

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, name: str) -> Tensor:
        """Raises BundleError for a file that was damaged since its names were read."""
        from safetensors import SafetensorError, safe_open

        place = self._places[name]
        try:
            # Opened anew each time: what is mapped counts as memory of this process.
            with safe_open(str(place.file), "pt") as opened:
                tensor = opened.get_tensor(place.key)
        except (SafetensorError, OSError) as error:
            raise BundleError(
                f"{place.file}: weight {place.key} cannot be read ({_first_line(error)}); "
                "copy the checkpoint again"
            ) from error
        new = self.shapes[name][0] - len(tensor) if is_table(name) else 0
        if new > 0:
            return torch.cat([tensor.float(), torch.zeros(new, tensor.shape[1])])
        # A copy either way, which may be written to.
        return torch.as_tensor(tensor.float() if tensor.dtype != torch.float32 else tensor.clone())


def is_table(name: str) -> bool:
    """Whether a parameter has a row a token: embedding and head."""
    return name.endswith(("embed_tokens.weight", "lm_head.weight"))


def is_grown(place: StoredTensor, shape: Sequence[int]) -> bool:
    """Whether a table of this shape is the stored one and rows for the markers that a full
    vocabulary lacks; they are 0 until they are trained.
    """
    return 0 < shape[0] - place.shape[0] <= len(MARKERS)


def check_names(checkpoint: Checkpoint) -> None:
    """Raises BundleError where the files of a checkpoint's base are not its weights, to the last
    tensor: before anything is loaded.
    """
    account(checkpoint.base, empty_model(checkpoint.config, checkpoint.processor.family))


def account(folder: Path, model: TransformersModule) -> dict[str, StoredTensor]:
    """{parameter: where it is stored}, for all but those that are tied to one that is.

    model: an empty model, or one on the meta device.

    Raises BundleError for a name that is missing, one that nothing takes, one that two tensors
    have, another shape, values that are no floats, and tied parameters that differ.
    """
    tensors = stored_tensors(folder)
    names = parameter_names(list(tensors), model)
    wanted = model.state_dict()
    places: dict[str, StoredTensor] = {}
    for key, name in names.items():
        if name not in wanted:
            continue
        if name in places:
            raise BundleError(
                f"{tensors[key].file}: {key} and {places[name].key} are both {name}; "
                "give the model's own weights"
            )
        places[name] = tensors[key]
    parameters = dict(model.named_parameters(remove_duplicate=False))
    _refuse_untied(folder, places, parameters)
    stored = {id(parameters[name]) for name in places if name in parameters}
    missing = [n for n in wanted if n not in places and id(parameters.get(n)) not in stored]
    _refuse_misnamed(folder, missing, _foreign(names, model))
    for name, place in places.items():
        refuse_quantized_tensor(place)
        shape = tuple(wanted[name].shape)
        if is_table(name) and place.shape[1:] == shape[1:] and is_grown(place, shape):
            continue
        if place.shape != shape:
            raise BundleError(
                f"{place.file}: weight {place.key} is {list(place.shape)}, "
                f"config.json asks for {list(shape)}"
            )
    return places


def parameter_names(keys: Sequence[str], model: TransformersModule) -> dict[str, str]:
    """{name in a file: the parameter that it is}, as transformers' own loading renames.

    Older releases of transformers named parameters otherwise, and tools leave prefixes (PREFIXES).
    What nothing takes keeps a name that the model lacks.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    rules = get_model_conversion_mapping(model, PREFIXES)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if not isinstance(rule, WeightRenaming)]
    prefix = model.base_model_prefix
    wanted = model.state_dict()
    names = {}
    for key in keys:
        name, _ = rename_source_key(key, renamings, converters, prefix, wanted)
        if name not in wanted and key in wanted:
            name, _ = rename_source_key(key, [], [], prefix, wanted)
        names[key] = name
    return names


def loaded_by_transformers(
    model: TransformersModule, tensors: Sequence[StoredTensor]
) -> dict[str, Tensor]:
    """{parameter: its values} in float32, of some tensors, as `from_pretrained` would load them:
    its renaming, converting and checking of shapes, and nothing of `parameter_names`.

    model: its `empty_model`, whose parameters are as before afterwards.

    Raises BundleError where transformers loads a tensor with an error, or takes it for another
    shape.
    """
    from safetensors import safe_open
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    before = dict(model.named_parameters(remove_duplicate=False))
    how = LoadStateDictConfig(
        dtype=torch.float32,
        device_map={"": "cpu"},
        weight_mapping=get_model_conversion_mapping(model, PREFIXES),
    )
    with contextlib.ExitStack() as stack:
        files = {t.file for t in tensors}
        opened = {file: stack.enter_context(safe_open(str(file), "pt")) for file in files}
        lazy = {t.key: opened[t.file].get_slice(t.key) for t in tensors}
        info, _ = convert_and_load_state_dict_in_model(model, lazy, how, None)
    if faults := [*info.mismatched_keys, *info.error_msgs, *info.conversion_errors.items()]:
        raise BundleError(f"{tensors[0].file}: transformers cannot load {min(map(str, faults))}")
    loaded = {}
    for name in sorted(set(before) - info.missing_keys):
        path, _, part = name.rpartition(".")
        module = model.get_submodule(path)
        loaded[name] = getattr(module, part).detach().float()
        setattr(module, part, before[name])
    return loaded


def _foreign(names: Mapping[str, str], model: TransformersModule) -> list[str]:
    """Names in files that nothing takes. What transformers itself passes over, such as buffers that
    older releases saved, is none of them.
    """
    from transformers.utils.loading_report import LoadStateDictInfo

    wanted = model.state_dict()
    info = LoadStateDictInfo(
        missing_keys=set(),
        unexpected_keys={name for name in names.values() if name not in wanted},
        mismatched_keys=set(),
        error_msgs=[],
        conversion_errors={},
        skipped_pp_keys=set(),
    )
    model._adjust_missing_and_unexpected_keys(info)
    return [key for key, name in names.items() if name in info.unexpected_keys]


def _refuse_untied(
    folder: Path, places: Mapping[str, StoredTensor], parameters: Mapping[str, nn.Parameter]
) -> None:
    """Raises BundleError where two names of one parameter have different values: transformers would
    untie them, against config.json.
    """
    first: dict[int, str] = {}
    for name, place in places.items():
        if name not in parameters:
            continue
        other = first.setdefault(id(parameters[name]), name)
        if other != name and not same_values(place, places[other]):
            raise BundleError(
                f"{folder}: {place.key} differs from {places[other].key}, and config.json ties "
                "them (tie_word_embeddings: true); set it to false there to use both"
            )


def _refuse_misnamed(folder: Path, missing: Sequence[str], foreign: Sequence[str]) -> None:
    """Raises BundleError where names are missing, or nothing takes them."""
    faults = []
    if missing:
        faults.append(f"{len(missing)} weights are missing (first: {_first_names(missing)})")
    if foreign:
        faults.append(
            f"nothing takes {len(foreign)} that are there (first: {_first_names(foreign)})"
        )
    if faults:
        raise BundleError(
            f"{folder}: {', and '.join(faults)}; give the weights of this config.json, merged and "
            "not quantized, or copy the checkpoint again"
        )


def _first_names(names: Sequence[str], count: int = 3) -> str:
    return ", ".join([*names[:count], *(["…"] if len(names) > count else [])])


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
