"""The simulated card: what it counts, what it casts, and what it does not let pass."""

from __future__ import annotations

from collections.abc import Iterator

import bitsandbytes
import pytest
import torch
from torch.nn import functional as F

from lvr_lite.train.simulated import SimulatedCard, WrongDeviceError

KIB = 1024


@pytest.fixture
def card() -> Iterator[SimulatedCard]:
    with SimulatedCard() as entered:
        yield entered


def floats(card: SimulatedCard, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=card.device)


def test_bytes_count_from_when_a_tensor_is_made_until_nothing_holds_it(card: SimulatedCard) -> None:
    with card.phase("one"):
        first = floats(card, 256, KIB)
        view = first[:128].t()
        assert card.now == KIB * KIB
    with card.phase("two"):
        second = first + first
        del first, second
        assert card.now == KIB * KIB, "a view holds its storage"
    del view
    assert card.now == 0
    assert card.peaks["one"] == KIB * KIB
    assert card.peaks["two"] == 2 * KIB * KIB


def test_small_tensors_take_what_the_allocator_gives(card: SimulatedCard) -> None:
    held = floats(card, 3)
    assert card.now == 512
    del held


def test_what_autograd_keeps_counts(card: SimulatedCard) -> None:
    weight = floats(card, 64, 64).requires_grad_()
    before = card.now
    loss = (floats(card, 1000, 64) @ weight).exp().sum()
    kept = card.now - before
    assert kept >= 2 * 1000 * 64 * 4, "the inputs of the product, and the result of exp"
    loss.backward()
    assert weight.grad is not None
    assert weight.grad.device.type == "card"


@pytest.mark.parametrize("into", ["sum", "product", "index", "in place"])
def test_a_tensor_of_the_cpu_is_refused(card: SimulatedCard, into: str) -> None:
    here = torch.zeros(4, 4)
    there = floats(card, 4, 4)
    ids = torch.zeros(2, dtype=torch.long, device=card.device)
    with pytest.raises(WrongDeviceError, match="cpu"):
        if into == "sum":
            there + here
        elif into == "product":
            there @ here
        elif into == "index":
            here[ids]
        else:
            there.add_(here)


def test_as_on_cuda_single_numbers_and_indices_may_lie_on_the_cpu(card: SimulatedCard) -> None:
    there = floats(card, 4, 4)
    assert (there * torch.tensor(2.0)).shape == (4, 4)
    assert there[torch.tensor([True, False, True, False])].shape == (2, 4)


def test_whole_numbers_are_known_so_that_code_may_branch_by_them(card: SimulatedCard) -> None:
    ids = torch.arange(10, device=card.device)
    late = ids > 6
    assert ids[late].tolist() == [7, 8, 9]
    assert int(late.sum()) == 3
    ids[late] = 0
    assert ids.tolist()[-3:] == [0, 0, 0]


def test_autocast_casts_as_on_cuda_and_keeps_a_parameters_copy(card: SimulatedCard) -> None:
    weight = floats(card, 8, 8).requires_grad_()
    with card.autocast(torch.bfloat16):
        product = floats(card, 2, 8) @ weight
        assert product.dtype == torch.bfloat16
        assert product.softmax(-1).dtype == torch.float32
        before = card.now
        again = floats(card, 2, 8) @ weight
        assert len(card.casts) == 1
        assert card.now - before == 1024, "the product and its cast input; the copy was there"
        assert torch.is_autocast_enabled(), "PEFT asks without naming a device"
        del again
    assert not card.casts
    assert not torch.is_autocast_enabled()


@pytest.mark.parametrize("masked", [False, True])
def test_attention_keeps_no_square(card: SimulatedCard, masked: bool) -> None:
    shape = (1, 4, 2048, 64)
    query = floats(card, *shape, dtype=torch.bfloat16).requires_grad_()
    mask = None
    if masked:
        mask = torch.ones(1, 1, 2048, 2048, dtype=torch.bool, device=card.device)
    before = card.now
    result = F.scaled_dot_product_attention(query, query, query, mask)
    kept = card.now - before
    square = 4 * 2048 * 2048 * 2
    # A mask is widened once for all heads.
    assert kept < square // 2 + (masked and square // 4)
    result.sum().backward()
    assert query.grad is not None


def test_a_product_in_4_bits_unpacks_the_weight_while_it_multiplies(card: SimulatedCard) -> None:
    weight = floats(card, 1024, 512, dtype=torch.bfloat16)
    packed, state = bitsandbytes.functional.quantize_4bit(
        weight, blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    del weight
    assert card.now < 1024 * 512 * 0.53 + 8 * 512
    rows = floats(card, 100, 512, dtype=torch.bfloat16).requires_grad_()
    before = card.now
    with card.phase("product"):
        result = bitsandbytes.matmul_4bit(rows, packed, state)
    assert card.peaks["product"] - before >= 2 * 1024 * 512
    assert card.now - before < 2 * 1024 * 512
    result.sum().backward()
    assert rows.grad is not None


def test_pages_of_an_optimizer_are_counted_apart(card: SimulatedCard) -> None:
    weight = torch.nn.Parameter(floats(card, 1000, 1000))
    weight.grad = torch.zeros_like(weight)
    before = card.now
    bitsandbytes.optim.AdamW([weight], optim_bits=8, is_paged=True).step()
    assert card.paged >= 2 * 1000 * 1000
    assert card.now - before < 200 * KIB


def test_nothing_of_it_is_left_behind() -> None:
    with SimulatedCard() as card:
        kept = torch.ones(3, device=card.device)
    assert not torch.is_autocast_enabled()
    assert all(book.device.type == "cpu" for book in bitsandbytes.functional.name2qmap.values())
    with pytest.raises(RuntimeError, match="after it is gone"):
        kept + kept
