"""A model that answers questions: `lvr_lite.open_model`. May import: numpy, Pillow and all that
stands above `commands`; torch only for a checkpoint, inside functions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from lvr_lite.errors import BundleError, UsageError
from lvr_lite.files import JsonObject
from lvr_lite.generate.ask import PictureCache, median_and_most, visual_tokens
from lvr_lite.generate.decode import Decoding, Options, Prompt, Result
from lvr_lite.generate.onnx import OnnxRuntime
from lvr_lite.generate.runtime import Runtime
from lvr_lite.model.bundle import Bundle, is_bundle
from lvr_lite.model.checkpoint import check_max_pixels, is_checkpoint, read_checkpoint
from lvr_lite.model.images import open_for_model
from lvr_lite.terminal import quiet_libraries

Picture = str | Path | Image.Image
# What the decoder of text writes for bytes that are no whole character yet.
PARTIAL = "\ufffd"


@dataclass(frozen=True)
class AskOptions(Options):
    """How to answer: as `lvr_lite.generate.decode.Options`, with room for a longer answer.

    max_tokens: text tokens at most.
    """

    max_tokens: int = 64


@dataclass(frozen=True)
class Answer:
    """The answer to one question.

    text: without markers and end of turn.
    tokens: the ids of `text`.
    latent_steps: how many latent steps came before or within it.
    look_forced: whether it looked because `AskOptions.look` was "always".
    visual_tokens: of each picture.
    reason: why it ended, "stop" or "length".
    ttft_ms: milliseconds from the pictures' arrival to the first token of text; None without one.
    question, pictures, prompt, result: what `Model.look` draws.
    """

    text: str
    tokens: list[int]
    latent_steps: int
    reason: str
    ttft_ms: float | None
    look_forced: bool
    visual_tokens: list[int]
    question: str = field(repr=False)
    pictures: list[Image.Image] = field(repr=False)
    prompt: Prompt = field(repr=False)
    result: Result = field(repr=False)

    def to_json(self) -> JsonObject:
        return {
            "answer": self.text,
            "tokens": self.tokens,
            "latent_steps": self.latent_steps,
            "looked": self.looked,
            "look_forced": self.look_forced,
            "visual_tokens": median_and_most(self.visual_tokens),
            "ttft_ms": self.ttft_ms,
        }

    @property
    def looked(self) -> bool:
        """Whether latent steps were taken."""
        return self.latent_steps > 0


@dataclass(frozen=True)
class AnswerEvent:
    """What happened while an answer was made.

    kind: "token", "start", "latent", "end" (of the latents) or "done".
    text: the whole characters that are new with this event; "" for most kinds.
    answer: all of it, with "done".
    """

    kind: str
    text: str = ""
    answer: Answer | None = None


class Model:
    """A bundle or a checkpoint, ready to answer. A second question about the same pictures does not
    read them again.
    """

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self._pictures = PictureCache(runtime)

    def ask(
        self, pictures: Sequence[Picture], question: str, options: AskOptions | None = None
    ) -> Answer:
        """Answer a question about pictures: RGB images, or paths. Raises LvrError for a picture
        that cannot be read and for options that this model cannot serve.
        """
        *_, last = self.stream(pictures, question, options)
        assert last.answer is not None
        return last.answer

    def stream(
        self, pictures: Sequence[Picture], question: str, options: AskOptions | None = None
    ) -> Iterator[AnswerEvent]:
        """As `ask`, event by event while the answer is made."""
        images = [p if isinstance(p, Image.Image) else open_for_model(Path(p)) for p in pictures]
        prompt, seconds = self._pictures.prepare_prompt(images, question)
        decoding = Decoding(self.runtime, [prompt], options or AskOptions())
        (result,) = decoding.results
        sent = ""
        for event in decoding:
            text = self.runtime.processor.text(result.tokens)
            if event.kind != "done":
                whole = not text.endswith(PARTIAL)
                yield AnswerEvent(event.kind, text[len(sent) :] if whole else "")
                sent = text if whole else sent
                continue
            before = seconds.preprocess + seconds.vision
            answer = Answer(
                text=text,
                tokens=result.tokens,
                latent_steps=len(result.latents),
                reason=result.reason,
                ttft_ms=None if result.ttft is None else (before + result.ttft) * 1e3,
                look_forced=result.look_forced,
                visual_tokens=visual_tokens(self.runtime, images),
                question=question,
                pictures=images,
                prompt=prompt,
                result=result,
            )
            yield AnswerEvent(event.kind, text[len(sent) :], answer)

    def look(self, answer: Answer) -> Image.Image:
        """Heat maps of which visual tokens each latent step of an answer is nearest to. Raises
        LvrError for an answer without latents.
        """
        from lvr_lite.views.look import answer_views, heat_maps

        views = answer_views(self.runtime, answer.pictures, answer.prompt, answer.result)
        return heat_maps(views, answer.question, answer.text)


def open_model(
    model: str | Path,
    *,
    threads: int | None = None,
    provider: str = "cpu",
    trained: bool = False,
    max_pixels: int | None = None,
) -> Model:
    """Open a bundle (under ONNX Runtime) or a checkpoint (under torch) by its folder, by the name
    `tiny`, or by a hub id.

    threads: of ONNX Runtime or torch, the same for all models of a process; all usable cores by
        default.
    provider: what runs a bundle's graphs.
    trained: leave a checkpoint as it was trained, in 4 bits, instead of merged in float32.
    max_pixels: shrink pictures to this area (pixels); the model's own by default.

    Raises BundleError for a folder that is neither, or damaged; UsageError where `provider` does
    not fit, and for pictures that are larger than a bundle was exported for.
    """
    return Model(open_runtime(model, threads, provider, trained, max_pixels))


def open_runtime(
    model: str | Path,
    threads: int | None = None,
    provider: str = "cpu",
    trained: bool = False,
    max_pixels: int | None = None,
) -> Runtime:
    """The runtime under `open_model`, for commands that decode themselves."""
    runtime = _open_runtime(model, threads, provider, trained)
    if max_pixels is not None:
        check_max_pixels(str(model), max_pixels)
        runtime.processor = runtime.processor.with_max_pixels(max_pixels)
    return runtime


def _open_runtime(model: str | Path, threads: int | None, provider: str, trained: bool) -> Runtime:
    folder = Path(model)
    if is_bundle(folder):
        return OnnxRuntime(Bundle.open(folder), threads, provider)
    if folder.is_dir() and not is_checkpoint(folder):
        raise BundleError(
            f"{model}: neither a bundle (lvr.json) nor a checkpoint "
            "(config.json, lvr_config.json) is in this folder"
        )
    if provider != "cpu":
        raise UsageError(
            f"provider {provider}: {model} is a checkpoint, which torch runs; export it first"
        )
    checkpoint = read_checkpoint(model)
    quiet_libraries()
    import torch

    from lvr_lite.generate.torch import TorchRuntime
    from lvr_lite.train import load

    if threads:
        torch.set_num_threads(threads)
    weights = load.load_trained(checkpoint) if trained else load.load_merged(checkpoint)
    return TorchRuntime(weights, checkpoint)
