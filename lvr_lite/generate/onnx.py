"""The device runtime: a bundle under ONNX Runtime.

May import: numpy, onnxruntime, lvr_lite.model, this folder; nothing of the workshop.

The decoder keeps its K/V in one buffer per layer, bound as input and output at once, and steps
through one prebuilt IOBinding whose hidden output is its next embedding input, so that a latent
step copies nothing in (docs/runtime.md).
"""

from __future__ import annotations

from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from lvr_lite.errors import BundleError, UsageError
from lvr_lite.model.bundle import MANIFEST, Bundle
from lvr_lite.model.families import Grid
from lvr_lite.system import usable_cores

# Columns read at once: what is computed between layers takes no more memory for a longer prompt.
PIECE = 512
# ONNX Runtime's kSameAsRequested; 0, its default, doubles what the arena holds whenever it grows.
_AS_REQUESTED = 1
# K/V buffers grow in such steps, so that prompts of about one length share them.
_CAPACITY_STEP = 64
# What --provider takes, and ONNX Runtime's name for it.
PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "qnn": "QNNExecutionProvider",
    "webgpu": "WebGpuExecutionProvider",
    "xnnpack": "XnnpackExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
    "directml": "DmlExecutionProvider",
}
# K/V of a batch: ONNX Runtime's values by "LAYER.key" and "LAYER.value".
Cache = dict[str, ort.OrtValue]
# Threads of the process's one pool, once it is there.
_pool_threads: int | None = None


def share_pools(threads: int | None = None) -> None:
    """Let all sessions of the process share one pool of threads and one memory arena.

    Pools of their own would spin against each other, which doubles the time a token takes. Arenas
    of their own would each keep the peak of one graph. The shared one grows by what is requested.

    threads: None takes the pool that is there, or makes one with a thread for every usable core.

    Raises UsageError where the pool is there and has another number of threads.
    """
    global _pool_threads
    if _pool_threads is None:
        _pool_threads = threads or usable_cores()
        ort.set_global_thread_pool_sizes(_pool_threads, 1)
        cpu = ort.OrtMemoryInfo(
            "Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT
        )
        arena = ort.OrtArenaCfg({"arena_extend_strategy": _AS_REQUESTED})
        ort.create_and_register_allocator(cpu, arena)
    elif threads not in (None, _pool_threads):
        raise UsageError(
            f"threads {threads}: this process already runs ONNX Runtime with {_pool_threads}; "
            "give every runtime of a process the same number"
        )


def check_provider(provider: str) -> None:
    """Raises UsageError for a provider that is not known, or that this onnxruntime was not built
    with.
    """
    available = ort.get_available_providers()
    here = [name for name, full in PROVIDERS.items() if full in available]
    if provider not in PROVIDERS:
        raise UsageError(f"provider {provider!r}: not known; choose one of {', '.join(PROVIDERS)}")
    if provider not in here:
        raise UsageError(
            f"provider {provider}: the onnxruntime {ort.__version__} that is installed here has "
            f"{', '.join(here)}; install the build of onnxruntime that has it in its place"
        )


def open_session(
    graph: Path | bytes, folder: Path | None = None, provider: str = "cpu"
) -> ort.InferenceSession:
    """A graph, ready to run in the one thread pool. What `provider` does not take runs on the CPU.

    graph: its file, or its bytes.
    folder: of the weights of a graph that is given as bytes.

    Raises BundleError where ONNX Runtime cannot load it, or where the provider does not start.
    """
    share_pools()
    options = ort.SessionOptions()
    options.use_per_session_threads = False
    options.log_severity_level = 3
    options.add_session_config_entry("session.use_env_allocators", "1")
    if folder is not None:
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(folder)
        )
    wanted = PROVIDERS[provider]
    names = list(dict.fromkeys([wanted, PROVIDERS["cpu"]]))
    source = graph if isinstance(graph, bytes) else str(graph)
    try:
        session = ort.InferenceSession(source, options, providers=names)
    # onnxruntime raises a class of its own for every reason; all of them end here.
    except Exception as error:
        name = graph if isinstance(graph, Path) else folder
        reason = str(error).splitlines()[0]
        raise BundleError(
            f"{name}: ONNX Runtime {ort.__version__} cannot load it ({reason})"
        ) from error
    # Where a provider's libraries are missing ONNX Runtime goes on with the CPU, and only logs it.
    if session.get_providers()[0] != wanted:
        raise BundleError(
            f"provider {provider}: did not start here, its drivers or libraries are missing "
            "(`lvr-lite doctor`)"
        )
    return session


# Types that a K/V cache may have.
CACHE_TYPES = ("float32", "float16")


def _cache_type(bundle: Bundle, cache_names: list[str]) -> np.dtype:
    """The type of the K/V cache. Raises BundleError where the manifest lacks an input of it."""
    inputs = bundle.manifest.graphs["decoder"].inputs
    for name in cache_names:
        info = inputs.get(f"past_key_values.{name}")
        if info is None or info.dtype not in CACHE_TYPES:
            raise BundleError(
                f"{bundle.folder / MANIFEST}: graphs.decoder.inputs has no past_key_values.{name} "
                f"of {' or '.join(CACHE_TYPES)}; export again"
            )
    return np.dtype(inputs[f"past_key_values.{cache_names[0]}"].dtype)


class OnnxRuntime:
    """A bundle, ready to decode (see `lvr_lite.generate.runtime.Runtime`).

    threads: of the process's one pool; see `share_pools`.
    provider: what runs the graphs, see PROVIDERS; K/V and states stay in the CPU's memory.

    Raises UsageError as `check_provider` and `share_pools`, BundleError as `open_session`.
    """

    def __init__(
        self,
        bundle: Bundle,
        threads: int | None = None,
        provider: str = "cpu",
    ) -> None:
        check_provider(provider)
        manifest = bundle.manifest
        self.bundle = bundle
        self.name = bundle.name
        self.processor = bundle.processor
        self.latent = manifest.latent
        self.hidden_size = manifest.decoder.hidden_size
        share_pools(threads)
        # The head first: while it is packed its one large weight is there twice, and nothing else
        # should be there yet.
        self._head = open_session(bundle.path("lm_head"), provider=provider)
        self._decoder = open_session(bundle.path("decoder"), provider=provider)
        self._vision = open_session(bundle.path("vision_encoder"), provider=provider)
        self._embed = open_session(bundle.path("embed_tokens"), provider=provider)
        self._cache_names = [
            f"{i}.{part}" for i in range(manifest.decoder.layers) for part in ("key", "value")
        ]
        self._cache_type = _cache_type(bundle, self._cache_names)
        deepstack = manifest.graphs["decoder"].inputs.get("deepstack_embeds")
        # Width of what visual tokens add in later layers.
        self._deepstack = int(deepstack.axes[-1]) if deepstack else 0
        self._batch = 0
        self._capacity = 0
        # The hidden states that lie in the step's input buffer already.
        self._in_state: np.ndarray | None = None

    def with_graphs(self, **graphs: Any) -> OnnxRuntime:
        """The same bundle with other sessions for some of its graphs: decoder, embed or head. The
        others are shared.
        """
        other = copy(self)
        other.__dict__.update({f"_{name}": session for name, session in graphs.items()})
        other._batch = 0
        other._capacity = 0
        return other

    def encode(self, pixel_values: np.ndarray, grids: list[Grid]) -> np.ndarray:
        feed = {"pixel_values": pixel_values, **self.processor.vision_inputs(grids)}
        (features,) = self._vision.run(None, feed)
        return np.asarray(features)

    def embed(self, ids: np.ndarray) -> np.ndarray:
        (embeds,) = self._embed.run(None, {"input_ids": ids})
        return np.asarray(embeds)

    def head(self, hidden: np.ndarray) -> np.ndarray:
        (logits,) = self._head.run(None, {"last_hidden_state": hidden[:, None]})
        return np.asarray(logits)[:, 0]

    def start(self, batch: int, capacity: int) -> None:
        capacity = -(-capacity // _CAPACITY_STEP) * _CAPACITY_STEP
        self._lengths = np.zeros(batch, np.int32)
        # What is left of the batch before lies beyond seqlens_k, where attention does not look.
        if batch == self._batch and capacity <= self._capacity:
            return
        self._batch = batch
        self._capacity = capacity
        self._cache = self._new_cache(batch, capacity)
        self._binding = self._bind(self._cache)
        zeros = np.zeros((batch, 1, self.hidden_size), np.float32)
        state = ort.OrtValue.ortvalue_from_numpy(zeros)
        # Arrays over the memory of what is bound: a step writes into them, and no call into ONNX
        # Runtime is needed for it.
        self._state = state.numpy()
        self._positions = self._bind_input("position_ids", np.zeros((3, batch, 1), np.int64))
        self._seqlens = self._bind_input("seqlens_k", np.zeros(batch, np.int32))
        self._total = self._bind_input("total_sequence_length", np.zeros((), np.int32))
        self._binding.bind_ortvalue_input("inputs_embeds", state)
        self._binding.bind_ortvalue_output("last_hidden_state", state)
        # Nothing that is fed step by step is a visual token.
        if self._deepstack:
            nothing = np.zeros((batch, 1, self._deepstack), np.float32)
            self._binding.bind_cpu_input("deepstack_embeds", nothing)

    def _new_cache(self, batch: int, capacity: int) -> Cache:
        decoder = self.bundle.manifest.decoder
        shape = (batch, decoder.kv_heads, capacity, decoder.head_dim)
        return {
            name: ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, self._cache_type))
            for name in self._cache_names
        }

    def _bind(self, cache: Cache) -> ort.IOBinding:
        binding = self._decoder.io_binding()
        for name, value in cache.items():
            binding.bind_ortvalue_input(f"past_key_values.{name}", value)
            binding.bind_ortvalue_output(f"present.{name}", value)
        return binding

    def _bind_input(self, name: str, array: np.ndarray) -> np.ndarray:
        value = ort.OrtValue.ortvalue_from_numpy(array)
        self._binding.bind_ortvalue_input(name, value)
        return np.asarray(value.numpy())

    def keep(self, length: int) -> list[np.ndarray]:
        buffers = [value.numpy() for value in self._cache.values()]
        return [buffer[:, :, :length].copy() for buffer in buffers]

    def put_back(self, kept: list[np.ndarray]) -> None:
        for value, known in zip(self._cache.values(), kept, strict=True):
            length = known.shape[2]
            value.numpy()[:, :, :length] = known

    def prefill(
        self,
        embeds: np.ndarray,
        positions: np.ndarray,
        lengths: np.ndarray,
        rows: list[int] | None = None,
        past: int = 0,
    ) -> np.ndarray:
        rows = list(range(self._batch)) if rows is None else rows
        width = embeds.shape[1]
        # Rows of several lengths cannot go on together after a first piece.
        if width > PIECE and len(rows) > 1:
            return self._prefill_one_by_one(embeds, positions, lengths, rows)
        # Rows that go on beside these keep their K/V, so these are read elsewhere and then put in
        # their place.
        beside_others = len(rows) < self._batch
        cache = self._new_cache(len(rows), width) if beside_others else self._cache
        for first in range(0, width, PIECE):
            end = first + PIECE
            hidden = self._read(
                cache,
                embeds[:, first:end],
                positions[:, :, first:end],
                past + np.minimum(lengths, end),
                past + min(end, width),
            )
        if beside_others:
            for name, value in cache.items():
                buffer = self._cache[name].numpy()
                buffer[rows, :, :width] = value.numpy()
        self._lengths[rows] = past + lengths
        self._in_state = None
        in_last_piece = (lengths - 1) % PIECE
        return np.ascontiguousarray(hidden[np.arange(len(rows)), in_last_piece])

    def _prefill_one_by_one(
        self,
        embeds: np.ndarray,
        positions: np.ndarray,
        lengths: np.ndarray,
        rows: list[int],
    ) -> np.ndarray:
        states = []
        for i, row in enumerate(rows):
            one = slice(i, i + 1)
            length = int(lengths[i])
            own_positions = positions[:, one, :length]
            states.append(self.prefill(embeds[one, :length], own_positions, lengths[one], [row]))
        return np.concatenate(states)

    def _read(
        self,
        cache: Cache,
        embeds: np.ndarray,
        positions: np.ndarray,
        known: np.ndarray,
        total: int,
    ) -> np.ndarray:
        """Hidden states (R, S, H) of the next S columns of the rows in `cache`.

        known: (R,), how many columns of each row are not padding, these included.
        total: columns, padding included.
        """
        binding = self._bind(cache)
        inputs = np.ascontiguousarray(embeds[..., : self.hidden_size], np.float32)
        binding.bind_cpu_input("inputs_embeds", inputs)
        if self._deepstack:
            own = embeds[..., self.hidden_size :]
            width = own.shape[-1]
            added = np.zeros((*embeds.shape[:2], self._deepstack), np.float32)
            added[..., :width] = own
            binding.bind_cpu_input("deepstack_embeds", added)
        binding.bind_cpu_input("position_ids", np.ascontiguousarray(positions))
        binding.bind_cpu_input("seqlens_k", (known - 1).astype(np.int32))
        binding.bind_cpu_input("total_sequence_length", np.array(total, np.int32))
        binding.bind_output("last_hidden_state")
        self._decoder.run_with_iobinding(binding)
        # Outputs come back in the order of binding.
        hidden = binding.get_outputs()[-1]
        return np.asarray(hidden.numpy())

    def step(self, embeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
        if embeds is not self._in_state:
            self._state[:, 0] = embeds
        self._seqlens[...] = self._lengths
        self._lengths += 1
        self._total[...] = self._lengths.max()
        self._positions[..., 0] = positions
        self._decoder.run_with_iobinding(self._binding)
        self._in_state = self._state[:, 0]
        return self._in_state
