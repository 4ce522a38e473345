"""A checkpoint's weights one at a time, so that a model of any size fits.

May import: torch, transformers, accelerate, safetensors, model/.

    model = empty_model(checkpoint.config, checkpoint.processor.family)
    weights = StoredWeights(checkpoint, model)
    weights["model.visual.blocks.0.mlp.down_proj.weight"]       # float32, read from its file now

The way of a weight from safetensors to ONNX:

    empty_model            the model with a code (a NaN) in the place of each parameter's values
    graphs.structure       its graphs, exported; the codes in them tell which weight is which
    StoredWeights          the values, read from *.safetensors by the parameter's name
    write.write_bundle     puts the values into the graphs, one weight at a time

Names are those of transformers' parameters, whatever the files call them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lvr_lite.errors import BundleError
from lvr_lite.files import JsonObject
from lvr_lite.model.checkpoint import Checkpoint
from lvr_lite.model.families import Family

# The first code: a float32 NaN that is signaling, with 22 bits free to number parameters. Any
# arithmetic makes a signaling NaN quiet, so a surviving pattern proves that the weight was used
# unchanged.
FIRST_CODE = 0x7F800001
# A model of transformers or a module in it: which attributes it has depends on its class, and none
# has a type.
TransformersModule = Any


def empty_model(config: JsonObject, family: Family) -> TransformersModule:
    """The model of a config.json, with parameters of the right shapes in no memory: each is a
    single NaN, expanded to its shape.

    Which NaN tells the parameter (`origins`), through views, transpositions and export. Buffers are
    real. Raises BundleError where transformers cannot make such a model.
    """
    import transformers
    from accelerate import init_empty_weights

    architecture = getattr(transformers, family.architecture)
    values = {key: value for key, value in config.items() if key != "model_type"}
    try:
        with init_empty_weights(include_buffers=False):
            model = architecture(architecture.config_class(**values))
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise BundleError(
            f"config.json: transformers cannot make a {family.model_type} of it "
            f"({_first_line(error)})"
        ) from error
    model.tie_weights()
    # By the identity of the parameter that they replace, so that tied ones stay tied.
    placeholders: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            key = id(parameter)
            if key not in placeholders:
                placeholders[key] = placeholder(len(placeholders), parameter.shape)
            setattr(module, name, placeholders[key])
    return model.eval()


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


class StoredWeights(Mapping[str, Tensor]):
    """The parameters of a checkpoint's base model, float32 on the CPU, each read from its file when
    it is asked for.
    """

    def __init__(self, checkpoint: Checkpoint, model: nn.Module) -> None:
        """model: its `empty_model`. Raises BundleError where a parameter is missing."""
        named = list(model.named_parameters(remove_duplicate=False))
        self.shapes = {name: tuple(parameter.shape) for name, parameter in named}
        self._places = _stored_places(checkpoint.base, model)
        # Of tied parameters, files hold one.
        stored = [(name, p) for name, p in reversed(named) if name in self._places]
        tied = {id(p): self._places[name] for name, p in stored}
        for name, parameter in named:
            if name not in self._places and id(parameter) in tied:
                self._places[name] = tied[id(parameter)]
        missing = [name for name in self.shapes if name not in self._places]
        if missing:
            raise BundleError(
                f"{checkpoint.base}: {len(missing)} weights are missing (first: {missing[0]}); "
                "copy the checkpoint again"
            )

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, name: str) -> Tensor:
        """Raises BundleError for a weight of another shape, an integer one, and a damaged file."""
        from safetensors import SafetensorError, safe_open

        file, key = self._places[name]
        try:
            # Opened anew each time: what is mapped counts as memory of this process.
            with safe_open(str(file), "pt") as opened:
                tensor = opened.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise BundleError(
                f"{file}: weight {key} cannot be read ({_first_line(error)}); "
                "copy the checkpoint again"
            ) from error
        if not tensor.is_floating_point():
            raise BundleError(
                f"{file}: weight {key} is stored as {tensor.dtype}; "
                "give a base model that is not quantized yet"
            )
        shape = self.shapes[name]
        if tuple(tensor.shape) != shape:
            raise BundleError(
                f"{file}: weight {key} is {list(tensor.shape)}, config.json asks for {list(shape)}"
            )
        # A copy either way, which may be written to.
        return torch.as_tensor(tensor.float() if tensor.dtype != torch.float32 else tensor.clone())


def _stored_places(folder: Path, model: TransformersModule) -> dict[str, tuple[Path, str]]:
    """{parameter: (file, its key there)}. Older releases of transformers named parameters
    otherwise; transformers itself knows how to rename those.
    """
    from safetensors import SafetensorError, safe_open
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if not isinstance(rule, WeightRenaming)]
    parameters = model.state_dict()
    places = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(str(file), "pt") as opened:
                keys = list(opened.keys())
        except (SafetensorError, OSError) as error:
            raise BundleError(
                f"{file}: truncated, or not a safetensors file ({_first_line(error)})"
            ) from error
        for key in keys:
            name, _ = rename_source_key(
                key, renamings, converters, model.base_model_prefix, parameters
            )
            places[name] = (file, key)
    return places


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
