"""A checkpoint's weights one at a time, so that a model of any size fits.

May import: torch, transformers, accelerate, safetensors, the core.

    model = empty_model(checkpoint.config, checkpoint.processor.family)   # its shape, in no memory
    weights = StoredWeights(checkpoint, model)
    weights["model.visual.blocks.0.mlp.down_proj.weight"]       # float32, read from its file now

Names are those of transformers' parameters, whatever the files call them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lvr_lite.errors import BundleError
from lvr_lite.model.checkpoint import Checkpoint
from lvr_lite.model.families import Family

# float32: a signaling NaN, with 22 bits free; whatever is computed from it is quiet, and so another
_NAN = 0x7F800001


def empty_model(config: dict[str, Any], family: Family) -> Any:
    """The model of a config.json with parameters of the right shapes in no memory: each is one NaN,
    seen everywhere.

    Which NaN tells the parameter (`origin`), through views, transpositions and export. Buffers are
    real. Raises BundleError where transformers cannot make such a model.
    """
    import transformers
    from accelerate import init_empty_weights

    architecture = getattr(transformers, family.architecture)
    try:
        with init_empty_weights(include_buffers=False):
            model = architecture(
                architecture.config_class(**{k: v for k, v in config.items() if k != "model_type"})
            )
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise BundleError(
            f"config.json: transformers cannot make a {family.model_type} of it ({str(error).splitlines()[0]})"
        ) from error
    model.tie_weights()
    made: dict[int, nn.Parameter] = {}  # tied ones stay tied
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in made:
                made[id(parameter)] = placeholder(len(made), parameter.shape)
            setattr(module, name, made[id(parameter)])
    return model.eval()


def placeholder(number: int, shape: Sequence[int]) -> nn.Parameter:
    """A parameter in no memory, which tells its number (`code_of`)."""
    code = torch.tensor([_NAN + number], dtype=torch.int32).view(torch.float32)
    return nn.Parameter(code.expand(tuple(shape)), requires_grad=False)


def origins(model: Any) -> dict[int, str]:
    """{code: parameter} of an empty model; of tied parameters the first."""
    return {
        code_of(parameter): name
        for name, parameter in reversed(list(model.named_parameters(remove_duplicate=False)))
    }


def code_of(tensor: Tensor) -> int:
    """What tells a parameter of an empty model, and whatever is a view of it, from the others."""
    return int(tensor.detach().flatten()[0].view(torch.int32))


class StoredWeights(Mapping[str, Tensor]):
    """The parameters of a checkpoint's base model, float32 on the CPU, each read when it is asked
    for.
    """

    def __init__(self, checkpoint: Checkpoint, model: Any) -> None:
        """model: its `empty_model`. Raises BundleError where a parameter is missing, or of another
        shape.
        """
        self.shapes = {
            name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)
        }
        self._files = _find(checkpoint.base, model)
        tied: dict[int, str] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if name in self._files:
                tied.setdefault(id(parameter), name)
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if name not in self._files and id(parameter) in tied:
                self._files[name] = self._files[tied[id(parameter)]]
        missing = [name for name in self.shapes if name not in self._files]
        if missing:
            raise BundleError(
                f"{checkpoint.base}: {len(missing)} weights are missing (first: {missing[0]}); copy the checkpoint again"
            )

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, name: str) -> Tensor:
        from safetensors import SafetensorError, safe_open

        file, key = self._files[name]
        try:
            with safe_open(
                str(file), "pt"
            ) as opened:  # anew each time: what is mapped counts as memory of this process
                tensor = opened.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise BundleError(
                f"{file}: weight {key} cannot be read ({str(error).splitlines()[0]}); copy the checkpoint again"
            ) from error
        if not tensor.is_floating_point():
            raise BundleError(
                f"{file}: weight {key} is stored as {tensor.dtype}; give a base model that is not quantized yet"
            )
        if tuple(tensor.shape) != self.shapes[name]:
            raise BundleError(
                f"{file}: weight {key} is {list(tensor.shape)}, config.json asks for {list(self.shapes[name])}"
            )
        return torch.as_tensor(tensor.float() if tensor.dtype != torch.float32 else tensor.clone())


def _find(folder: Path, model: Any) -> dict[str, tuple[Path, str]]:
    """{parameter: (file, its key there)}: older transformers named parameters otherwise, and the
    present one knows how.
    """
    from safetensors import SafetensorError, safe_open
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if not isinstance(rule, WeightRenaming)]
    known = model.state_dict()
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(str(file), "pt") as opened:
                keys = list(opened.keys())
        except (SafetensorError, OSError) as error:
            raise BundleError(
                f"{file}: truncated, or not a safetensors file ({str(error).splitlines()[0]})"
            ) from error
        for key in keys:
            name, _ = rename_source_key(key, renamings, converters, model.base_model_prefix, known)
            found[name] = (file, key)
    return found
