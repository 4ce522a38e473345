"""A card that does not exist: torch runs the real code on it, without its memory and its time.

May import: torch, bitsandbytes, the standard library.

    with SimulatedCard() as card:
        model = place(model, card)
        with card.phase("forward"):
            loss = model(**batch)
        print(card.peaks["forward"])

It is a backend of torch's (PrivateUse1). A tensor on it has a shape, a type and a size, and no
numbers:

    metadata    every operation runs on the meta device, so shapes and types are those of torch
    bytes       a storage counts from the operation that makes it until nothing holds it any more,
                rounded up as torch's allocator for CUDA rounds
    devices     a tensor of the CPU among those of the card raises, as on CUDA
    autocast    casts what CUDA's casts, and keeps a parameter's copy as long
    attention   is one fused kernel: its result and the log-sum-exp of each query, no S x S
    numbers     small whole numbers and truth values are computed beside, on the CPU, so that code
                may index and branch by ids and masks; what nobody can know is noise where it is
                copied to the CPU, and false where it is asked for
"""

from __future__ import annotations

import contextlib
import functools
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import bitsandbytes.functional as bnb
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "card"
# torch's allocator for CUDA rounds up to so many bytes (c10/cuda/CUDACachingAllocator.cpp).
GRAIN = 512
# Elements of a tensor whose numbers are computed beside.
KNOWN = 1 << 17
# Elements of the noise that is copied to the CPU; odd, so that rows differ.
NOISE = 65_537
# Rows from which on bitsandbytes may unpack a 4-bit weight instead of multiplying with it packed
# (bitsandbytes/backends/cuda/ops.py, _gemm_4bit_use_custom_cuda: between 5 and 1,536 by card).
UNPACKED_FROM = 5

# Types in which attention without a mask is flash attention on CUDA.
FLASH = (torch.bfloat16, torch.float16)

aten = torch.ops.aten


class WrongDeviceError(RuntimeError):
    """An operation was given tensors of the card and of the CPU."""


class CardTensor(torch.Tensor):
    """A tensor on the simulated card.

    meta: the same on the meta device; its storage is what is counted.
    value: its numbers on the CPU where they are known, else None.
    """

    meta: torch.Tensor
    value: torch.Tensor | None

    @staticmethod
    def __new__(cls, meta: torch.Tensor, value: torch.Tensor | None = None) -> CardTensor:
        tensor: CardTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            meta.shape,
            strides=meta.stride(),
            storage_offset=meta.storage_offset(),
            dtype=meta.dtype,
            device=torch.device(NAME, 0),
        )
        tensor.meta = meta
        tensor.value = value
        return tensor

    def known(self) -> torch.Tensor | None:
        """Its numbers, or None; a float of one element counts as 1 where it is not known."""
        if self.value is not None and not getattr(self.meta.untyped_storage(), "unknown", False):
            return self.value
        if self.meta.numel() == 1 and self.meta.is_floating_point():
            return torch.ones(self.meta.shape, dtype=self.meta.dtype)
        return None

    @property
    def data(self) -> torch.Tensor:
        return torch.Tensor.data.__get__(self)  # type: ignore[attr-defined,no-any-return]

    @data.setter  # type: ignore[override]
    def data(self, other: CardTensor) -> None:
        torch.Tensor.data.__set__(self, other)  # type: ignore[attr-defined]
        self.meta = other.meta
        self.value = other.value

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"CardTensor({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        card = SimulatedCard.present
        if card is None:
            raise RuntimeError("a tensor of the simulated card is used after it is gone")
        return card.__torch_dispatch__(func, types, args, kwargs)


# -------------------------------------------------------------------------------------- the device


class _Module:
    """`torch.card`: what torch asks of a backend's module."""

    # Nothing random is kept on the card: checkpointing asks no generator.
    _initialized = False

    @staticmethod
    def is_available() -> bool:
        return SimulatedCard.present is not None

    @staticmethod
    def device_count() -> int:
        return 1

    @staticmethod
    def current_device() -> int:
        return 0

    @staticmethod
    def get_amp_supported_dtype() -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    @staticmethod
    def _is_in_bad_fork() -> bool:
        return False

    @staticmethod
    def manual_seed_all(_: int) -> None:
        return None


class _Hook(torch._C._acc.PrivateUse1Hooks):  # type: ignore[misc, name-defined]
    def is_available(self) -> bool:
        return SimulatedCard.present is not None

    def has_primary_context(self, _: int) -> bool:
        return SimulatedCard.present is not None

    def is_built(self) -> bool:
        return True


# What was registered lives as long as these.
_libraries: list[torch.library.Library] = []


def register() -> None:
    """Make the device known to torch, once a process.

    It must come before the first backward pass of the process: torch makes a thread for each device
    that it knows then, and none later.
    """
    if _libraries:
        return
    _setup_privateuseone_for_python_backend(NAME, _Module(), _Hook())
    every = torch.library.Library("_", "IMPL")
    every.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    library = torch.library.Library("aten", "IMPL")
    for name in LOWER:
        _register_autocast(library, name, lower=True)
    for name in WIDER:
        _register_autocast(library, name, lower=False)
    library.impl("scaled_dot_product_attention", _attention, "AutogradPrivateUse1")
    # CUDA has a kernel of its own where other devices put it together of several.
    library.impl("silu_backward", _refuse, "PrivateUse1")
    _libraries.extend((every, library))


def _refuse(*_: Any) -> torch.Tensor:
    raise RuntimeError("a tensor of the card has no kernel: the simulated card is not entered")


# ---------------------------------------------------------------------------------------- autocast

# What CUDA's autocast computes in the lower type, and what in fp32, of what is used here
# (aten/src/ATen/autocast_mode.h).
LOWER = (
    *("addmm", "addbmm", "baddbmm", "bmm", "einsum", "linear", "matmul", "mm", "mv"),
    *("conv1d", "conv2d", "conv3d", "convolution", "scaled_dot_product_attention"),
)
WIDER = (
    *("exp", "log", "log10", "log2", "log1p", "expm1", "reciprocal", "rsqrt", "logsumexp"),
    *("pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar", "softplus", "layer_norm"),
    *("mse_loss", "l1_loss", "kl_div", "nll_loss", "cosine_similarity", "cumsum", "prod"),
    *("softmax.int", "log_softmax.int", "sum", "sum.dim_IntList", "norm.ScalarOpt_dim"),
)


def _register_autocast(library: torch.library.Library, name: str, lower: bool) -> None:
    packet, _, overload = name.partition(".")
    operator = getattr(getattr(aten, packet), overload or "default")
    # torch's stubs do not know the key.
    key: Any = torch._C.DispatchKey
    without = torch._C.DispatchKeySet(key.AutocastPrivateUse1)

    def kernel(*args: Any, **kwargs: Any) -> Any:
        dtype = torch.get_autocast_dtype(NAME) if lower else torch.float32
        with torch._C._ExcludeDispatchKeyGuard(without):
            cast_args = [_cast(value, dtype, lower) for value in args]
            cast_kwargs = {key: _cast(value, dtype, lower) for key, value in kwargs.items()}
            return operator(*cast_args, **cast_kwargs)

    library.impl(name, kernel, "AutocastPrivateUse1")


def _cast(value: Any, dtype: torch.dtype, lower: bool) -> Any:
    """As at::autocast::cached_cast: a leaf that is trained is cast once a forward pass."""
    if isinstance(value, list | tuple):
        return [_cast(one, dtype, lower) for one in value]
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return value
    if value.dtype == dtype:
        return value
    card = SimulatedCard.present
    kept = lower and value.requires_grad and value.is_leaf and value.dtype == torch.float32
    if not kept or card is None or not torch.is_autocast_cache_enabled():
        return value.to(dtype)
    if id(value) not in card.casts:
        card.casts[id(value)] = (value, value.to(dtype))
    return card.casts[id(value)][1]


# --------------------------------------------------------------------------------------- attention


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """What torch chooses on CUDA: flash attention in 16 bits without a mask, else the kernel that
    is memory-efficient. The first takes fewer heads of keys as they are, the other does not.
    """
    card = SimulatedCard.present
    if card is not None and query.dtype in card.flash and attn_mask is None:
        result = torch._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, False, scale=scale
        )
        return torch.as_tensor(result[0])
    if enable_gqa:
        repeats = query.shape[1] // key.shape[1]
        key = key.repeat_interleave(repeats, 1)
        value = value.repeat_interleave(repeats, 1)
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            zeros = torch.zeros_like(attn_mask, dtype=query.dtype)
            attn_mask = zeros.masked_fill_(attn_mask.logical_not(), -torch.inf)
        shape = (*query.shape[:3], key.shape[2])
        attn_mask = attn_mask.to(query.dtype).expand(shape)
    trained = any(tensor.requires_grad for tensor in (query, key, value))
    needs_grad = torch.is_grad_enabled() and trained
    efficient = torch._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, needs_grad, dropout_p, is_causal, scale=scale
    )
    return torch.as_tensor(efficient[0])


# ---------------------------------------------------------------------------------------- the card


class SimulatedCard(TorchDispatchMode):
    """The card, while it is entered; one at a time in a process.

    now: bytes of live tensors.
    peaks: the most of them in each phase, in the order in which phases came first.
    paged: bytes in pages that may move to the host (`bitsandbytes`); not among `now`.
    casts: parameters in autocast's lower type, until the outermost autocast ends.
    """

    present: SimulatedCard | None = None

    def __init__(self, flash: Sequence[torch.dtype] = FLASH) -> None:
        """flash: the types in which attention without a mask is flash attention."""
        super().__init__()
        register()
        self.flash = flash
        self.device = torch.device(NAME, 0)
        self.now = 0
        self.paged = 0
        self.peaks: dict[str, int] = {}
        self.casts: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._phase = "loading"
        self._undo = contextlib.ExitStack()
        self._noise = torch.empty(NOISE).uniform_(-0.02, 0.02, generator=_generator())
        self._drawn = 0
        self._shapes: dict[Any, tuple[torch.Size, tuple[int, ...], torch.dtype]] = {}

    def __enter__(self) -> SimulatedCard:
        if SimulatedCard.present is not None:
            raise RuntimeError("another simulated card is in use")
        SimulatedCard.present = self
        self._undo.enter_context(_as_cuda(self))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._undo.close()
        self.casts.clear()
        SimulatedCard.present = None

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What is made meanwhile counts for the phase of this name."""
        before = self._phase
        self._phase = name
        self.peaks[name] = max(self.peaks.get(name, 0), self.now)
        try:
            yield
        finally:
            self._phase = before

    @contextlib.contextmanager
    def autocast(self, dtype: torch.dtype) -> Iterator[None]:
        """As training on CUDA enters it; nothing in fp32."""
        with torch.autocast(NAME, dtype, dtype != torch.float32):
            yield

    # ---------------------------------------------------------------------------------- operations

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        # torch.tensor(…, device=card) is to make its tensor on the CPU and copy it. Each thread of
        # the backward pass has a switch of its own.
        torch._C._set_only_lift_cpu_tensors(True)
        if not torch.is_inference_mode_enabled():
            return self.run(func, args, kwargs or {})
        # A view that inference makes of another tensor is none of inference's own.
        with torch._C._InferenceMode(False), torch.no_grad():
            return self.run(func, args, kwargs or {})

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here; to forbid it takes longer than an operation."""
        return False

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Within an operation: what is made of several others counts, too."""
        TorchDispatchMode.__enter__(self)
        try:
            yield
        finally:
            TorchDispatchMode.__exit__(self, None, None, None)

    def run(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], plain: bool = False
    ) -> Any:
        """One operation. Raises WrongDeviceError where tensors of the CPU are among those of the
        card.

        plain: as it is on the meta device, whatever `SPECIAL` says.
        """
        own = _Arguments()
        metas = own.take(args)
        own.key.append(tuple(kwargs))
        named = {name: own.take(value) for name, value in kwargs.items()}
        if not own.cards and not own.made_on_card:
            return func(*args, **kwargs)
        special = None if plain else SPECIAL.get(func)
        if special is not None:
            return special(self, func, *args, **kwargs)
        if _is_composite(func):
            with self.again():
                return func.decompose(*args, **kwargs)
        if own.others and not plain:
            raise WrongDeviceError(
                f"{func}: expected all tensors on one device, but found {NAME}:0 and "
                f"{own.others[0].device}, of shape {tuple(own.others[0].shape)}"
            )
        made = self._made(func, metas, named, own)
        value = self._value(func, args, kwargs, own, made)
        return self._wrapped(made, value, own)

    def _made(
        self, func: Any, metas: tuple[Any, ...], named: dict[str, Any], own: _Arguments
    ) -> Any:
        """What an operation makes on the meta device. An operation that makes one new tensor is run
        once for arguments of the same shapes; afterwards its result is made at once.
        """
        if not _makes_one(func):
            return func(*metas, **named)
        key = (func, *own.key)
        try:
            known = self._shapes.get(key)
        except TypeError:
            return func(*metas, **named)
        if known is not None:
            size, stride, dtype = known
            return torch.empty_strided(size, stride, dtype=dtype, device="meta")
        made = func(*metas, **named)
        storages = {card.meta.untyped_storage()._cdata for card in own.cards}
        if made.untyped_storage()._cdata not in storages:
            self._shapes[key] = (made.shape, made.stride(), made.dtype)
        return made

    def _value(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        own: _Arguments,
        made: Any,
    ) -> Any:
        """The numbers of what an operation makes, where they can be known and are few; else None.
        What is written to becomes unknown where the numbers that are written are.
        """
        known = all(card.known() is not None for card in own.cards)
        written = _written(func, args, kwargs)
        random = torch.Tag.nondeterministic_seeded in func.tags
        if known and not random and (written or _few(made)):
            values = _values(args)
            named = {name: _values(value) for name, value in kwargs.items()}
            return func(*values, **named)
        for tensor in written:
            tensor.meta.untyped_storage().unknown = True  # type: ignore[attr-defined]
        return None

    def _wrapped(self, made: Any, value: Any, own: _Arguments) -> Any:
        if isinstance(made, torch.Tensor):
            known = own.by_meta.get(id(made))
            if known is not None:
                return known
            self.count(made.untyped_storage())
            return CardTensor(made, value if _few(made) else None)
        if isinstance(made, list | tuple):
            values = value if isinstance(value, list | tuple) else [None] * len(made)
            parts = [self._wrapped(one, v, own) for one, v in zip(made, values, strict=True)]
            return type(made)(parts)
        return made

    # --------------------------------------------------------------------------------------- bytes

    def count(self, storage: torch.UntypedStorage, paged: bool = False) -> None:
        """A storage counts from now on until it is gone."""
        if getattr(storage, "counted", False):
            return
        storage.counted = True  # type: ignore[attr-defined]
        size = -(-storage.nbytes() // GRAIN) * GRAIN
        if paged:
            self.paged += size
            return
        weakref.finalize(storage, self._give_back, size)
        self.now += size
        if self.now > self.peaks.get(self._phase, 0):
            self.peaks[self._phase] = self.now

    def _give_back(self, size: int) -> None:
        self.now -= size

    def made(self, tensor: torch.Tensor) -> CardTensor:
        """A tensor of the CPU, or of the meta device, on the card."""
        if isinstance(tensor, CardTensor):
            return tensor
        meta = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        value = tensor.detach() if tensor.device.type == "cpu" and _few(tensor) else None
        self.count(meta.untyped_storage())
        return CardTensor(meta, None if value is None else value.clone())

    def in_pages(self, shape: Sequence[int], dtype: torch.dtype) -> CardTensor:
        """A tensor in pages that may move to the host: counted apart."""
        meta = torch.empty(tuple(shape), dtype=dtype, device="meta")
        self.count(meta.untyped_storage(), paged=True)
        return CardTensor(meta)

    def noise(self, tensor: torch.Tensor) -> torch.Tensor:
        """Numbers for a tensor whose numbers nobody knows, on the CPU; other ones each time."""
        if not tensor.is_floating_point():
            return torch.zeros(tensor.shape, dtype=tensor.dtype)
        count = tensor.numel()
        self._drawn += 1
        start = self._drawn * 7919 % NOISE
        times = math.ceil((start + count) / NOISE)
        flat = self._noise.repeat(times)[start : start + count]
        return flat.reshape(tensor.shape).to(tensor.dtype)

    def on_cpu(self, tensor: CardTensor) -> torch.Tensor:
        """Its numbers, or noise for them."""
        value = tensor.known() if tensor.numel() != 1 or tensor.value is not None else None
        return self.noise(tensor.meta) if value is None else value.clone()


class _Arguments:
    """What an operation was given.

    cards: tensors of the card, and by the identity of what stands for them on the meta device.
    others: tensors of the CPU, single numbers apart.
    made_on_card: whether the card is named as where something is made.
    key: what the shape of a result depends on.
    """

    def __init__(self) -> None:
        self.cards: list[CardTensor] = []
        self.others: list[torch.Tensor] = []
        self.by_meta: dict[int, CardTensor] = {}
        self.made_on_card = False
        self.key: list[Any] = []

    def take(self, value: Any) -> Any:
        """The same with tensors of the meta device."""
        if isinstance(value, CardTensor):
            self.cards.append(value)
            meta = value.meta
            self.by_meta[id(meta)] = value
            self.key.append((meta.shape, meta.stride(), meta.dtype))
            return meta
        if isinstance(value, torch.Tensor):
            self.key.append((value.shape, value.stride(), value.dtype, "cpu"))
            if value.dim() and value.device.type != "meta":
                self.others.append(value)
                return value.to("meta")
            return value
        if isinstance(value, torch.device) and value.type == NAME:
            self.made_on_card = True
            return torch.device("meta")
        if isinstance(value, list):
            self.key.append(len(value))
            return [self.take(one) for one in value]
        if isinstance(value, tuple):
            self.key.append(len(value))
            return tuple(self.take(one) for one in value)
        self.key.append((value, type(value)))
        return value


@functools.cache
def _makes_one(func: Any) -> bool:
    """Whether an operation makes one new tensor, and neither writes to one nor is a view of one."""
    schema = func._schema
    if schema.is_mutable or len(schema.returns) != 1:
        return False
    (made,) = schema.returns
    return made.alias_info is None and str(made.type) == "Tensor"


@functools.cache
def _is_composite(func: Any) -> bool:
    """Whether an operation is made of others; autograd takes these apart, inference does not."""
    name = func.name()
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return has(name, "CompositeImplicitAutograd") and not has(name, "Meta")


def _few(made: Any) -> bool:
    """Whether the numbers of what was made are worth computing."""
    if isinstance(made, torch.Tensor):
        return made.numel() == 1 or (not made.is_floating_point() and made.numel() <= KNOWN)
    if isinstance(made, list | tuple):
        return all(_few(one) for one in made)
    return True


def _values(value: Any) -> Any:
    if isinstance(value, CardTensor):
        return value.known()
    if isinstance(value, torch.device) and value.type == NAME:
        return torch.device("cpu")
    if isinstance(value, list):
        return [_values(one) for one in value]
    if isinstance(value, tuple):
        return tuple(_values(one) for one in value)
    return value


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[CardTensor]:
    """The tensors that an operation writes to."""
    if not func._schema.is_mutable:
        return []
    written = []
    for number, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[number] if number < len(args) else kwargs.get(argument.name)
            parts = value if isinstance(value, list | tuple) else [value]
            written += [part for part in parts if isinstance(part, CardTensor)]
    return written


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


# ------------------------------------------------------------ operations that are done another way


def _to_copy(card: SimulatedCard, func: Any, tensor: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    device = torch.device(kwargs.pop("device", None) or tensor.device)
    kwargs.pop("non_blocking", None)
    kwargs.pop("pin_memory", None)
    if device.type == NAME and isinstance(tensor, CardTensor):
        made = func(tensor.meta, **kwargs)
        known = tensor.known()
        value = func(known, **kwargs) if known is not None and _few(made) else None
        card.count(made.untyped_storage())
        return CardTensor(made, value)
    if device.type == NAME:
        return card.made(func(tensor, **kwargs))
    if device.type == "meta":
        raise WrongDeviceError(f"{func}: from {tensor.device} to the meta device")
    assert isinstance(tensor, CardTensor)
    return torch.as_tensor(func(card.on_cpu(tensor), **kwargs))


def _copy(
    card: SimulatedCard, func: Any, into: torch.Tensor, source: torch.Tensor, *_: Any, **__: Any
) -> torch.Tensor:
    """Between devices, too."""
    if not isinstance(into, CardTensor):
        assert isinstance(source, CardTensor)
        return torch.as_tensor(func(into, card.on_cpu(source)))
    known = source.known() if isinstance(source, CardTensor) else source
    own = into.known()
    if known is None or own is None:
        into.meta.untyped_storage().unknown = True  # type: ignore[attr-defined]
    else:
        func(own, known)
    return into


def _scalar(_: SimulatedCard, func: Any, tensor: CardTensor) -> Any:
    """A number for the host. Nobody knows it: false, zero, or a float of one."""
    known = tensor.known()
    return func(torch.zeros((), dtype=tensor.dtype) if known is None else known)


def _chosen(mask: CardTensor) -> torch.Tensor:
    """A mask's truth values on the CPU; all true where nobody knows."""
    known = mask.known()
    return torch.ones(mask.shape, dtype=torch.bool) if known is None else known


def _nonzero(card: SimulatedCard, _: Any, tensor: CardTensor) -> torch.Tensor:
    return card.made(_chosen(tensor).nonzero())


def _places(card: SimulatedCard, indices: Sequence[torch.Tensor | None]) -> list[Any]:
    """Indices with the places of masks instead of these, as CUDA finds them first."""
    places: list[Any] = []
    for index in indices:
        if index is None or index.dtype not in (torch.bool, torch.uint8):
            places.append(index)
            continue
        chosen = _chosen(index) if isinstance(index, CardTensor) else index
        places += [card.made(axis) for axis in chosen.nonzero().unbind(1)]
    return places


def _index(
    card: SimulatedCard, func: Any, tensor: torch.Tensor, indices: Any, *more: Any, **named: Any
) -> Any:
    """As CUDA takes it: indices may lie on the CPU, and nothing else."""
    parts = (tensor, *more)
    wrong = [part for part in parts if isinstance(part, torch.Tensor) and part.dim()]
    wrong = [part for part in wrong if not isinstance(part, CardTensor)]
    if wrong:
        raise WrongDeviceError(f"{func}: expected {NAME}:0 and found {wrong[0].device}")
    places = _places(card, indices)
    return card.run(func, (tensor, places, *more), named, plain=True)


def _masked_select(
    card: SimulatedCard, _: Any, tensor: CardTensor, mask: CardTensor
) -> torch.Tensor:
    shape = torch.broadcast_shapes(tensor.shape, mask.shape)
    places = _places(card, [mask.expand(shape)])
    return torch.as_tensor(
        card.run(aten.index.Tensor, (tensor.expand(shape), places), {}, plain=True)
    )


def _by_numbers(card: SimulatedCard, func: Any, *args: Any, **kwargs: Any) -> Any:
    """What only numbers can tell the shape of: whole numbers that are known."""
    values = _values(args)
    if any(value is None for value in values):
        raise NotImplementedError(f"{func}: its shape depends on numbers that nobody knows")
    made = func(*values, **kwargs)
    if isinstance(made, torch.Tensor):
        return card.made(made)
    return tuple(card.made(part) for part in made)


def _compared(card: SimulatedCard, func: Any, tensor: CardTensor, number: Any) -> torch.Tensor:
    """What nobody knows is no certain number: SmolVLM looks for tiles of zeros alone."""
    made = card.run(func, (tensor, number), {}, plain=True)
    if made.known() is None and tensor.is_floating_point():
        made.value = torch.tensor(func is aten.ne.Scalar).expand(made.shape)
    return torch.as_tensor(made)


def _equal(_: SimulatedCard, func: Any, one: torch.Tensor, other: torch.Tensor) -> bool:
    values = _values((one, other))
    return all(value is not None for value in values) and bool(func(*values))


def _product_in_4_bits(
    card: SimulatedCard,
    func: Any,
    rows: CardTensor,
    packed: CardTensor,
    shape: Sequence[int],
    absmax: CardTensor,
    blocksize: int,
    kind: str,
    bias: torch.Tensor | None = None,
    *scales: CardTensor,
) -> torch.Tensor:
    """bitsandbytes' product with a weight in 4 bits: many rows take the whole weight unpacked, and
    its scales in fp32.
    """
    if rows.numel() // rows.shape[-1] < UNPACKED_FROM:
        whole = (rows, packed, shape, absmax, blocksize, kind, bias, *scales)
        return torch.as_tensor(card.run(func, whole, {}, plain=True))
    with card.again():
        count = -(-math.prod(shape) // blocksize)
        unpacked_scales = torch.empty(count, dtype=torch.float32, device=card.device)
        unpack = torch.ops.bitsandbytes.dequantize_4bit.default
        weight = unpack(packed, unpacked_scales, blocksize, kind, shape, rows.dtype)
        return torch.nn.functional.linear(rows, weight, bias)


def _attention_alone(card: SimulatedCard, _: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    with card.again():
        return _attention(*args, **kwargs)


SPECIAL: dict[Any, Callable[..., Any]] = {
    aten._to_copy.default: _to_copy,
    aten.copy_.default: _copy,
    aten._local_scalar_dense.default: _scalar,
    aten.nonzero.default: _nonzero,
    aten.index.Tensor: _index,
    aten.index_put.default: _index,
    aten.index_put_.default: _index,
    aten._index_put_impl_.default: _index,
    aten._unsafe_index.Tensor: _index,
    aten.masked_select.default: _masked_select,
    aten.bincount.default: _by_numbers,
    aten.repeat_interleave.Tensor: _by_numbers,
    aten.unique_consecutive.default: _by_numbers,
    aten._unique2.default: _by_numbers,
    aten.equal.default: _equal,
    aten.eq.Scalar: _compared,
    aten.ne.Scalar: _compared,
    aten.scaled_dot_product_attention.default: _attention_alone,
    torch.ops.bitsandbytes.gemm_4bit.default: _product_in_4_bits,
}


# ------------------------------------------------------------------- what libraries ask CUDA about


@contextlib.contextmanager
def _as_cuda(card: SimulatedCard) -> Iterator[None]:
    """Libraries see the card where they look for CUDA: PEFT asks for its autocast switch, torch's
    optimizers for tensors that they may put together, bitsandbytes for pages.
    """
    from torch.optim.optimizer import _foreach_supported_types

    asked = torch.is_autocast_enabled
    cleared = torch.clear_autocast_cache

    def is_autocast_enabled(device_type: str = NAME) -> bool:
        return asked(NAME if device_type == "cuda" else device_type)

    def clear_autocast_cache() -> None:
        card.casts.clear()
        cleared()

    def get_paged(*shape: int, dtype: torch.dtype, **_: Any) -> torch.Tensor:
        pages = card.in_pages(shape, dtype)
        pages.is_paged = True  # type: ignore[attr-defined]
        return pages

    def nothing(*_: Any, **__: Any) -> None:
        """Pages are filled and fetched without tensors."""

    changes = (
        (torch, "is_autocast_enabled", is_autocast_enabled),
        (torch, "clear_autocast_cache", clear_autocast_cache),
        (bnb, "get_paged", get_paged),
        (bnb, "fill", nothing),
        (bnb, "prefetch_tensor", nothing),
    )
    before = [getattr(module, name) for module, name, _ in changes]
    _foreach_supported_types.append(CardTensor)
    lifted = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)
    # Code books that bitsandbytes keeps on the device that asked first.
    books = dict(bnb.name2qmap)
    bnb.name2qmap.clear()
    for module, name, value in changes:
        setattr(module, name, value)
    try:
        yield
    finally:
        torch._C._set_only_lift_cpu_tensors(lifted)
        bnb.name2qmap.clear()
        bnb.name2qmap.update(books)
        _foreach_supported_types.remove(CardTensor)
        for (module, name, _), value in zip(changes, before, strict=True):
            setattr(module, name, value)
