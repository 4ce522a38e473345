"""The marker rows compute what PEFT's trained tokens compute, without a copy of the table."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.trainable_tokens import TrainableTokensLayer
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lvr_lite.config import load_settings
from lvr_lite.data.sources import Item, open_source
from lvr_lite.generate.ask import prepare_prompt
from lvr_lite.generate.decode import Options, decode
from lvr_lite.generate.torch import TorchRuntime
from lvr_lite.model.checkpoint import Checkpoint, read_checkpoint
from lvr_lite.model.spec import LatentSpec
from lvr_lite.train.batches import Collator
from lvr_lite.train.load import adapted, load_nf4
from lvr_lite.train.marker_rows import keep_tables
from lvr_lite.train.sft import LatentSFT

SETTINGS = load_settings(
    None,
    ["lora.rank=4", "latent.method=lvr-bottleneck", "latent.samples=all", "latent.steps=2"],
)


@pytest.fixture(scope="module", params=["tied", "untied"])
def checkpoint(
    request: pytest.FixtureRequest, small_checkpoint: Path, tmp_path_factory: Any
) -> Checkpoint:
    if request.param == "tied":
        return read_checkpoint(small_checkpoint)
    folder = Path(shutil.copytree(small_checkpoint, tmp_path_factory.mktemp("untied") / "base"))
    config = json.loads((folder / "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = False
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    (table,) = [tensors[name] for name in tensors if name.endswith("embed_tokens.weight")]
    tensors["lm_head.weight"] = table.flip(0).contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return read_checkpoint(folder)


@pytest.fixture(scope="module")
def items() -> list[Item]:
    return list(open_source("scenes", "train", 0, 2).items())


@pytest.fixture(scope="module")
def model(checkpoint: Checkpoint) -> Any:
    """Adapted, and its marker rows moved."""
    made = adapted(load_nf4(checkpoint, torch.float32), checkpoint, SETTINGS)
    rows = [p for name, p in made.named_parameters() if "trainable_tokens" in name]
    with torch.no_grad():
        for number, row in enumerate(rows):
            row.add_(0.1 * (number + 1) * torch.randn(row.shape))
    return made


def step(model: Any, checkpoint: Checkpoint, items: list[Item]) -> dict[str, torch.Tensor]:
    """The gradients of one step, and its loss."""
    model.zero_grad(set_to_none=True)
    sft = LatentSFT(model.train(), checkpoint.processor.tokens, SETTINGS.latent)
    loss = sft(**Collator(checkpoint, SETTINGS.latent)(items))["loss"]
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return gradients | {"loss": loss.detach()}


def as_peft_made_it(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, TrainableTokensLayer):
            module.__class__ = TrainableTokensLayer


def test_losses_and_gradients_are_those_of_peft(
    model: Any, checkpoint: Checkpoint, items: list[Item]
) -> None:
    own = step(model, checkpoint, items)
    as_peft_made_it(model)
    wanted = step(model, checkpoint, items)
    keep_tables(model)
    rows = [name for name in wanted if "trainable_tokens" in name]
    assert len(rows) == (1 if checkpoint.config["tie_word_embeddings"] else 2)
    assert set(own) == set(wanted)
    for name, value in wanted.items():
        assert float((own[name] - value).norm()) <= 1e-5 * float(value.norm()), name


class CopiesOfTheTable(TorchDispatchMode):
    """Notes operations that give a tensor of its own in the shape of a table (V, H)."""

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.shape = set(table.shape)
        self.operations: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        before = {
            leaf.untyped_storage().data_ptr()
            for leaf in tree_leaves(args)
            if isinstance(leaf, torch.Tensor)
        }
        for leaf in tree_leaves(result):
            if not isinstance(leaf, torch.Tensor) or set(leaf.shape) != self.shape:
                continue
            if leaf.untyped_storage().data_ptr() not in before:
                self.operations.append(str(func))
        return result


def test_neither_a_step_nor_decoding_makes_a_tensor_as_large_as_the_table(
    model: Any, checkpoint: Checkpoint, items: list[Item]
) -> None:
    table = model.get_base_model().get_input_embeddings().original_module.weight
    with CopiesOfTheTable(table) as large:
        step(model, checkpoint, items[:1])
    assert large.operations == []
    as_peft_made_it(model)
    with CopiesOfTheTable(table) as large:
        step(model, checkpoint, items[:1])
    keep_tables(model)
    assert large.operations, "copies are not noticed"
    looking = replace(checkpoint, latent=LatentSpec(2, mode="bottleneck"))
    runtime = TorchRuntime(model.eval(), looking)
    sample, pictures = items[0]
    with CopiesOfTheTable(table) as large:
        prompt, _ = prepare_prompt(runtime, pictures, sample.question)
        decode(runtime, [prompt], Options(max_tokens=2, look="always"))
    assert large.operations == []


def test_peft_reads_what_is_saved(model: Any, checkpoint: Checkpoint, tmp_path: Path) -> None:
    model.save_pretrained(str(tmp_path), safe_serialization=True)
    again = PeftModel.from_pretrained(load_nf4(checkpoint, torch.float32), str(tmp_path))
    tokens = checkpoint.processor.tokens
    ids = torch.tensor([[5, tokens.lvr_start, tokens.lvr]])
    states = torch.randn(2, checkpoint.config["text_config"]["hidden_size"])
    own, theirs = model.get_base_model(), again.get_base_model()
    torch.testing.assert_close(
        own.get_input_embeddings()(ids), theirs.get_input_embeddings()(ids), rtol=0, atol=0
    )
    torch.testing.assert_close(own.lm_head(states), theirs.lm_head(states), rtol=1e-5, atol=1e-5)
