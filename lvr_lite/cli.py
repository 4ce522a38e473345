"""The command line: options in, one clear line out on error. Thin, and heavy imports stay inside
commands, so that --help is instant.

May import at the top: typer and the standard library; inside commands everything,
`lvr_lite.export`, `.quant` and `.bench` included.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from lvr_lite.config import Settings
    from lvr_lite.generate.runtime import Runtime
    from lvr_lite.model.checkpoint import Checkpoint

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Latent visual reasoning: fine-tune on one GPU, export to ONNX, run and measure quantized on a device.",
)
data_app = typer.Typer(
    no_args_is_help=True, help="Make, convert, check and look at data.", rich_markup_mode=None
)
app.add_typer(data_app, name="data")

JsonOut = Annotated[
    Path | None, typer.Option("--json", help="Write what was printed as JSON to this file.")
]
Threads = Annotated[
    int | None,
    typer.Option("--threads", min=1, help="Threads of ONNX Runtime; all usable cores by default."),
]
Provider = Annotated[
    str,
    typer.Option(
        help="What runs a bundle's graphs: cpu, or cuda, coreml, qnn, webgpu, xnnpack, openvino, directml where installed."
    ),
]
Block = Annotated[
    int | None,
    typer.Option(
        help="Weights of 4 bits that share a scale, a power of two; 128 by default, 32 for mixed."
    ),
]
Bits = Annotated[
    float | None,
    typer.Option(
        help="For mixed: bits a weight of decoder, embedding and head, scales included; 5 by default."
    ),
]
Calibration = Annotated[
    str | None,
    typer.Option(
        help="For int4 and mixed: scenes (drawn; the default), or a file of samples; none, for int4 alone."
    ),
]
TuneSteps = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="For int4 and mixed: steps that train scales and norms after rounding; 0 for none. [96; 0 beyond 4 GiB]",
    ),
]
Model = Annotated[
    str,
    typer.Option(
        help="Whose resizing and visual tokens: tiny, or the folder of a checkpoint or a bundle."
    ),
]
Recipe = Annotated[Path | None, typer.Option(help="YAML recipe; see configs/.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="Override a setting: section.key=value.")
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on from the last whole checkpoint in OUT.")
]
PlanOnly = Annotated[
    bool, typer.Option("--plan", help="Say what memory it will need, what fits, and train nothing.")
]
Vram = Annotated[
    float | None,
    typer.Option(help="With --plan: the card's memory in GiB; 8, 12, 16 and 24 by default."),
]
PRECISIONS = ("exact", "fp32", "int8", "int4", "mixed", "fp16")
Steps = Annotated[
    int | None,
    typer.Option("--steps", min=0, help="Latent steps K; the model's own by default, 0 for none."),
]


def main() -> None:
    """Run the command line; user errors become one line and an exit code (1, or 2 for a wrong
    call), tracebacks come with --debug.
    """
    from lvr_lite.errors import LvrError

    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    try:
        app(args=arguments, prog_name="lvr-lite")
    except LvrError as error:
        if debug:
            raise
        _fail(str(error), error.exit_code)
    except OSError as error:
        if debug:
            raise
        where = f"{error.filename}: " if error.filename else ""
        _fail(
            f"{where}{error.strerror or error}; check the path, the permissions and the free space",
            1,
        )
    except ImportError as error:
        if debug:
            raise
        _fail(f"{_missing_package(error)}", 1)


def _fail(message: str, code: int) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


def _missing_package(error: ImportError) -> str:
    name = (error.name or "").split(".")[0]
    exports = ("onnx", "onnxscript", "onnx_ir", "optimum", "matplotlib")
    extra = "export" if name in exports else "benchmarks" if name == "pyarrow" else "train"
    return f'this command needs the package {error.name or error}: pip install "lvr-lite[{extra}]" (`lvr-lite doctor` shows what else)'


def _say(line: str) -> None:
    if os.environ.get("RANK", "0") == "0":  # of the processes that train together, one speaks
        print(line, file=sys.stderr, flush=True)


def _write_json(path: Path | None, data: dict[str, Any]) -> None:
    if path is not None:
        from lvr_lite.files import write_atomically

        write_atomically(path, json.dumps(data, indent=1))


def _open(
    model: str, threads: int | None = None, trained: bool = False, provider: str = "cpu"
) -> Runtime:
    """A runtime over a bundle (ONNX Runtime) or a checkpoint (torch: merged in fp32, or with
    `trained` as it was trained in 4 bits).
    """
    from lvr_lite.model.bundle import Bundle, is_bundle

    folder = Path(model)
    if is_bundle(folder):
        from lvr_lite.generate.onnx import OnnxRuntime

        return OnnxRuntime(Bundle.open(folder), threads, provider)
    from lvr_lite.errors import BundleError
    from lvr_lite.model.checkpoint import is_checkpoint

    if folder.is_dir() and not is_checkpoint(folder):
        raise BundleError(
            f"{model}: neither a bundle (lvr.json) nor a checkpoint (config.json, lvr_config.json) is in this folder"
        )
    if provider != "cpu":
        from lvr_lite.errors import UsageError

        raise UsageError(
            f"provider {provider}: {model} is a checkpoint, which torch runs; export it first"
        )
    from lvr_lite.model.checkpoint import read_checkpoint

    checkpoint = read_checkpoint(model)
    _quiet_libraries()
    from lvr_lite.generate.torch import TorchRuntime
    from lvr_lite.train import load as nf4

    if threads:
        import torch

        torch.set_num_threads(threads)
    return TorchRuntime(
        nf4.load_trained(checkpoint) if trained else nf4.load_merged(checkpoint), checkpoint
    )


def _quiet_libraries() -> None:
    """Progress bars and notices of the libraries would drown what this program says."""
    import logging
    import warnings

    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # both are of transformers' and bitsandbytes' own making, and nothing that a user could mend
    warnings.filterwarnings(
        "ignore", message=".*gradient_checkpointing.* is deprecated", category=FutureWarning
    )
    warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU.*")


@app.command()
def finetune(
    model: Annotated[str, typer.Option(help="tiny, a model folder, or a hub id.")],
    data: Annotated[
        str | None, typer.Option(help="scenes, or a file of samples (JSONL, official LVR JSON).")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the adapter, settings, metrics and checkpoints.")
    ] = None,
    config: Recipe = None,
    set_: Overrides = None,
    resume: Resume = False,
    plan: PlanOnly = False,
    vram: Vram = None,
    json_: JsonOut = None,
) -> None:
    """Teach a model, loaded in 4 bits, to reason in visual latents (QLoRA). --data and --out are
    needed but for --plan.

    Example: lvr-lite finetune --model tiny --data scenes --out tuned
    """
    from lvr_lite.config import load_settings
    from lvr_lite.errors import UsageError
    from lvr_lite.model.checkpoint import read_checkpoint, resolve

    _check_plan("finetune", plan, vram, resume, data, out)
    recipe = config or _recipe_of(resolve(model), "recipe.yaml")
    settings = load_settings(recipe, set_)
    checkpoint = read_checkpoint(model)
    if checkpoint.adapter:
        raise UsageError(
            f"--model {model}: is a tuned checkpoint; give its base ({checkpoint.base}), or go on with --resume"
        )
    if plan:
        _show_plan(model, checkpoint, settings, vram, json_)
        return
    assert data is not None and out is not None
    _quiet_libraries()
    from lvr_lite.eval.suite import accuracy_on
    from lvr_lite.train import load as nf4
    from lvr_lite.train.finetune import finetune as run_finetune

    _say(f"recipe: {recipe}" + (f" with {', '.join(set_)}" if set_ else ""))
    _say_trained(
        "finetune",
        out,
        run_finetune(checkpoint, nf4.load_nf4, data, out, settings, resume, accuracy_on, _say),
        json_,
    )


def _recipe_of(base: Path, name: str) -> Path:
    """The recipe that comes with the package: of the embedded model, or of any other."""
    from lvr_lite.model.checkpoint import resolve

    embedded = resolve("tiny")
    return (
        embedded.parent if base.resolve() == embedded.resolve() else embedded.parents[1] / "train"
    ) / name


def _show_plan(
    name: str, checkpoint: Checkpoint, settings: Settings, vram: float | None, json_: Path | None
) -> None:
    from lvr_lite.train import memory as planning

    report = planning.plan(
        name, checkpoint.config, checkpoint.processor.image.max_pixels, settings, vram
    )
    planning.show(report)
    _write_json(json_, report)


def _say_trained(command: str, out: Path, metrics: dict[str, Any], json_: Path | None) -> None:
    _say(
        f"{out}: {metrics['steps']} steps in {metrics['minutes']:.1f} min, peak memory {metrics['peak_memory_gb']:.2f} GiB"
    )
    _write_json(json_, {"schema": f"lvr-lite/{command}", "version": 1, "out": str(out)} | metrics)


def _check_plan(
    command: str, plan: bool, vram: float | None, resume: bool, data: str | None, out: Path | None
) -> None:
    from lvr_lite.errors import UsageError

    if vram is not None and not plan:
        raise UsageError("--vram is for --plan, which trains nothing; leave it out, or add --plan")
    if vram is not None and not 0 < vram < 1e4:
        raise UsageError(f"--vram {vram:g}: must be the memory of a card in GiB, such as 12")
    if plan and resume:
        raise UsageError("--plan trains nothing: leave out --resume")
    missing = [name for name, given in (("--data", data), ("--out", out)) if given is None]
    if missing and not plan:
        raise UsageError(f"{command} needs {' and '.join(missing)}; only --plan goes without")


@app.command()
def grpo(
    checkpoint: Annotated[
        str, typer.Option(help="A checkpoint that was tuned with latents (`lvr-lite finetune`).")
    ],
    data: Annotated[
        str | None, typer.Option(help="scenes, or a file of samples; boxes are not needed.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the adapter, settings, metrics and checkpoints.")
    ] = None,
    config: Recipe = None,
    set_: Overrides = None,
    resume: Resume = False,
    plan: PlanOnly = False,
    vram: Vram = None,
    json_: JsonOut = None,
) -> None:
    """Reinforce right answers (GRPO): the model finds its own latents, and is paid for what can be
    checked. --data and --out are needed but for --plan.

    Example: lvr-lite grpo --checkpoint tuned --data scenes --out reinforced
    """
    from lvr_lite.config import load_settings
    from lvr_lite.model.checkpoint import read_checkpoint

    _check_plan("grpo", plan, vram, resume, data, out)
    tuned = read_checkpoint(checkpoint)
    recipe = config or _recipe_of(tuned.base, "grpo.yaml")
    settings = load_settings(recipe, set_)
    if plan:
        from lvr_lite.train.memory import stage2

        _show_plan(checkpoint, tuned, stage2(settings, tuned.latent), vram, json_)
        return
    assert data is not None and out is not None
    _quiet_libraries()
    from lvr_lite.eval.suite import accuracy_on
    from lvr_lite.train import load as nf4
    from lvr_lite.train.grpo import grpo as run_grpo

    _say(f"recipe: {recipe}" + (f" with {', '.join(set_)}" if set_ else ""))
    _say_trained(
        "grpo",
        out,
        run_grpo(tuned, nf4.load_trained, data, out, settings, resume, accuracy_on, _say),
        json_,
    )


@app.command()
def export(
    checkpoint: Annotated[
        str,
        typer.Argument(
            help="A checkpoint's folder, `tiny`, or a hub id; BUNDLE, with --synthetic."
        ),
    ],
    bundle: Annotated[Path | None, typer.Argument(help="Folder to write.")] = None,
    precision: Annotated[
        str, typer.Option(help="exact, fp32, int8, int4, mixed or fp16.")
    ] = "int8",
    synthetic: Annotated[
        str | None,
        typer.Option(
            metavar="SHAPE",
            help="Random weights of a known model's shape, such as qwen2-vl-2b, instead of a checkpoint.",
        ),
    ] = None,
    block: Block = None,
    bits: Bits = None,
    calibration: Calibration = None,
    tune_steps: TuneSteps = None,
    json_: JsonOut = None,
) -> None:
    """Write a checkpoint as ONNX graphs cut at the latent loop, checked against torch.

    Example: lvr-lite export tuned bundle --precision int8
    """
    from lvr_lite.errors import UsageError

    if precision not in PRECISIONS:
        raise UsageError(
            f"--precision {precision}: must be {', '.join(PRECISIONS[:-1])} or {PRECISIONS[-1]}"
        )
    rounding = _Rounding(precision, block, bits, calibration, tune_steps)
    _quiet_libraries()
    began = time.time()
    if synthetic is not None:
        if calibration is not None:
            raise UsageError(
                "--calibration: random weights have nothing to be calibrated for; leave it out"
            )
        if tune_steps is not None:
            raise UsageError(
                "--tune-steps: random weights have nothing to be trained for; leave it out"
            )
        if bundle is not None:
            raise UsageError("--synthetic takes no checkpoint; give the folder to write alone")
        report, bundle = (
            _export_synthetic(synthetic, Path(checkpoint), precision, block),
            Path(checkpoint),
        )
    elif bundle is None:
        raise UsageError(
            "export needs a checkpoint and the folder to write (or --synthetic SHAPE and the folder)"
        )
    else:
        report = _export(checkpoint, bundle, rounding)
    _say_done(bundle, began)
    _write_json(
        json_,
        {"schema": "lvr-lite/export", "version": 1, "bundle": str(bundle), "precision": precision}
        | report,
    )


@dataclass(frozen=True)
class _Rounding:
    """The flags of `export` and `quantize` that say how weights are rounded. Raises UsageError for
    one that would do nothing.
    """

    precision: str
    block: int | None
    bits: float | None
    calibration: str | None
    tune_steps: int | None

    def __post_init__(self) -> None:
        from lvr_lite.errors import UsageError

        if self.precision not in ("int4", "mixed"):
            for flag, given in (
                ("--block", self.block),
                ("--calibration", self.calibration),
                ("--tune-steps", self.tune_steps),
            ):
                if given is not None:
                    raise UsageError(
                        f"{flag} is for weights of 4 bits, which --precision {self.precision} has none of; leave it out"
                    )
        if self.calibration == "none" and self.tune_steps:
            raise UsageError(
                "--tune-steps trains on what --calibration gives, which is none here; leave one of them out"
            )
        if self.bits is not None and self.precision != "mixed":
            raise UsageError(
                f"--bits is the budget of --precision mixed, not of {self.precision}; leave it out"
            )

    def quantize(self, source: Path, target: Path) -> dict[str, Any]:
        """Write the fp32 bundle `source` to `target`; its report.json."""
        from lvr_lite.model.bundle import Bundle
        from lvr_lite.quant.calibrated import BITS, quantize_calibrated
        from lvr_lite.quant.quantize import check_precision, quantize_bundle

        check_precision(self.precision)
        opened = Bundle.open(source)
        data = self.calibration or "scenes"
        if self.precision == "mixed" or (self.precision == "int4" and data != "none"):
            return quantize_calibrated(
                opened,
                target,
                self.precision,
                data,
                _say,
                self.block,
                self.bits or BITS,
                self.tune_steps,
            ).to_json()
        return quantize_bundle(opened, target, self.precision, _say, self.block).to_json()


def _say_done(bundle: Path, began: float) -> None:
    from lvr_lite.system import peak_rss_mb

    _say(
        f"{bundle}: written and checked in {time.time() - began:.0f} s, peak memory {(peak_rss_mb() or 0) / 1024:.1f} GiB"
    )


def _export(checkpoint: str, bundle: Path, rounding: _Rounding) -> dict[str, Any]:
    import shutil

    from lvr_lite.export.write import write_bundle
    from lvr_lite.files import check_free_space, fresh_folder
    from lvr_lite.model.checkpoint import read_checkpoint
    from lvr_lite.train import load as nf4

    read, precision = read_checkpoint(checkpoint), rounding.precision
    if precision == "exact":
        import torch

        from lvr_lite.quant.exact import ExactConvert

        weights = nf4.TrainedWeights(read, unmerged=True)

        def trained() -> Any:
            return nf4.load_trained(read, torch.float32)

        return {
            "parity": write_bundle(
                read, weights, bundle, _say, trained, "exact", ExactConvert(weights)
            ).manifest.parity
        }
    merged = nf4.TrainedWeights(read)

    def reference() -> Any:
        return nf4.load_merged(read)

    if precision == "fp32":
        return {"parity": write_bundle(read, merged, bundle, _say, reference).manifest.parity}
    parameters = sum(p.numel() for p in merged.model.parameters())
    check_free_space(
        bundle, int(parameters * (6.5 if precision == "fp16" else 5.5))
    )  # in float32 first, then quantized
    with (
        fresh_folder(bundle) as staged
    ):  # all that is made on the way lies in it, so that a killed run leaves one folder to sweep
        write_bundle(read, merged, staged / "fp32", _say, reference)
        report = rounding.quantize(staged / "fp32", staged / "made")
        shutil.rmtree(staged / "fp32")
        for path in (staged / "made").iterdir():
            path.rename(staged / path.name)
        (staged / "made").rmdir()
    return report


def _export_synthetic(
    shape: str, bundle: Path, precision: str, block: int | None
) -> dict[str, Any]:
    from lvr_lite.errors import UsageError
    from lvr_lite.export.synthetic import SyntheticWeights, shape_of
    from lvr_lite.export.write import write_bundle
    from lvr_lite.quant.form import check_form
    from lvr_lite.quant.quantize import Converter
    from lvr_lite.quant.schemes import plan_of

    made = shape_of(shape)
    if precision not in ("fp32", "int8", "int4", "fp16"):
        raise UsageError(
            f"--synthetic writes fp32, int8, int4 or fp16, not {precision}: random weights have nothing to search or to keep"
        )
    plan = plan_of(precision, block) if precision.startswith("int") else None
    convert = None if precision == "fp32" else Converter(plan)
    source = {"synthetic": shape, "base": shape, "adapter": False}
    written = write_bundle(
        made,
        SyntheticWeights(made),
        bundle,
        _say,
        precision=precision,
        convert=convert,
        source=source,
    )
    check_form(written)
    return {"bytes": {name: graph.bytes for name, graph in written.manifest.graphs.items()}}


@app.command()
def quantize(
    bundle: Annotated[Path, typer.Argument(help="An fp32 bundle.")],
    target: Annotated[Path, typer.Argument(help="Folder to write.")],
    precision: Annotated[str, typer.Option(help="int8, int4, mixed or fp16.")] = "int8",
    block: Block = None,
    bits: Bits = None,
    calibration: Calibration = None,
    tune_steps: TuneSteps = None,
    json_: JsonOut = None,
) -> None:
    """Quantize the weights of an fp32 bundle, and say what was replaced and what was not.

    mixed gives each layer 4 or 8 bits under a budget, by what this costs in answers and latents on
    a calibration set.

    Example: lvr-lite quantize fp32 mixed --precision mixed --bits 4.8
    """
    rounding = _Rounding(precision, block, bits, calibration, tune_steps)
    began = time.time()
    report = rounding.quantize(bundle, target)
    _say_done(target, began)
    _write_json(
        json_, {"schema": "lvr-lite/quantize", "version": 1, "bundle": str(target)} | report
    )


@app.command()
def run(
    model: Annotated[str, typer.Argument(help="A bundle or a checkpoint.")],
    words: Annotated[
        list[str], typer.Argument(metavar="IMAGE... QUESTION", help="Pictures, then the question.")
    ],
    steps: Steps = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Text tokens at most.")] = 64,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 takes the most likely token.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(help="Sample from the smallest set of tokens of this probability.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
    stream: Annotated[bool, typer.Option("--stream", help="Print tokens as they come.")] = False,
    look: Annotated[
        Path | None,
        typer.Option(
            metavar="PNG",
            help="Draw which visual tokens each latent step is nearest to, as heat maps.",
        ),
    ] = None,
    also: Annotated[
        list[str] | None,
        typer.Option(help="Another question about the same pictures, which are not read again."),
    ] = None,
    provider: Provider = "cpu",
    threads: Threads = None,
    json_: JsonOut = None,
) -> None:
    """Answer a question about one or more pictures.

    Example: lvr-lite run bundle picture.png "what colour is the star"
    """
    from lvr_lite.generate import ask
    from lvr_lite.generate.decode import Decoding, Options
    from lvr_lite.model.images import open_picture

    *images, question = words
    if not all(q.strip() for q in (question, *(also or []))):
        from lvr_lite.errors import UsageError

        raise UsageError("the question is empty; write it after the pictures, in quotes")
    if not images and Path(question).is_file():
        from lvr_lite.errors import UsageError

        raise UsageError(f"{question} is a file; write the question after the pictures, in quotes")
    pictures = [open_picture(Path(image)) for image in images]
    runtime = _open(model, threads, provider=provider)
    if look is not None:
        from lvr_lite.views import look as looking

        looking.refuse(look, images, runtime.latent, steps)
    options = Options(
        max_tokens=max_tokens, steps=steps, temperature=temperature, top_p=top_p, seed=seed
    )
    known = ask.PictureCache(runtime)
    answers, first = [], None
    for asked in (question, *(also or [])):
        prompt, seconds = known.prepare_prompt(pictures, asked)
        decoding = Decoding(runtime, [prompt], options)
        shown = ""
        for event in decoding:
            if stream and event.kind in ("token", "done"):
                text = runtime.processor.text(decoding.results[0].tokens)
                print(text[len(shown) :], end="", flush=True)
                shown = text
        result = decoding.results[0]
        first = first or (prompt, result)
        text = runtime.processor.text(result.tokens)
        print() if stream else print(text)
        if result.reason == "length":
            _say(f"cut at {max_tokens} tokens; raise it with --max-tokens")
        ttft = (
            None
            if result.ttft is None
            else (seconds.preprocess + seconds.vision + result.ttft) * 1e3
        )
        answers.append(
            {
                "answer": text,
                "tokens": result.tokens,
                "latent_steps": len(result.latents),
                "ttft_ms": ttft,
            }
        )
    from lvr_lite.system import peak_rss_mb

    also_told = {"also": answers[1:]} if also else {}
    _write_json(
        json_,
        {"schema": "lvr-lite/run", "version": 1}
        | answers[0]
        | {"peak_rss_mb": peak_rss_mb()}
        | also_told,
    )
    if look is not None and first is not None:
        prompt, result = first
        looking.write_look(
            look,
            looking.look(
                looking.views(runtime, pictures, prompt, result),
                question,
                str(answers[0]["answer"]),
            ),
        )
        _say(f"{look}: the nearest visual tokens of {len(result.latents)} latent steps")


@app.command("eval")
def eval_(
    model: Annotated[str, typer.Argument(help="A bundle or a checkpoint.")],
    suite: Annotated[
        str,
        typer.Option(
            help="scenes, skills (what the embedded model could do before), mmvp, vstar, blink, hrbench, or a file of samples."
        ),
    ] = "scenes",
    path: Annotated[
        str | None,
        typer.Option(
            metavar="DIR", help="The folder of a benchmark's files, as they are published."
        ),
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(
            help="Compare with this model, or with a file of --json, on the same questions; repeatable."
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Questions at most; 300 of the scenes or skills by default.")
    ] = None,
    skills: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Skills asked beside the scenes; 150, or --limit if fewer, by default; 0 for none.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=999_999, help="Of the held-out scenes.")] = 0,
    steps: Annotated[
        str | None,
        typer.Option(
            help="Latent steps K, several with commas: 0,4,8; the model's own by default."
        ),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Questions decoded together.")] = 16,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="Text tokens at most; 16, or 64 for skills and benchmarks, by default."
        ),
    ] = None,
    answers: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Add every answer to this file (JSONL), and go on from those that are in it.",
        ),
    ] = None,
    threads: Threads = None,
    json_: JsonOut = None,
) -> None:
    """Score a model on held-out questions, with n and a 95 % interval, and beside others on the
    same ones.

    --steps and --answers are for MODEL alone; a model in --against takes its own latent steps.

    Example: lvr-lite eval bundle --limit 300 --against tiny

    Example: lvr-lite eval bundle --suite mmvp --path MMVP --steps 0,4,8 --answers mmvp.jsonl
    """
    from lvr_lite.eval.report import show
    from lvr_lite.eval.suite import Plan, compare, reference_hint

    of_model = tuple(k for k in _numbers("--steps", steps) if k is not None)
    plan = Plan(suite, limit, seed, of_model, batch, max_tokens, skills, path, answers)
    from rich.progress import MofNCompleteColumn, Progress

    with Progress(
        *Progress.get_default_columns(), MofNCompleteColumn(), console=_stderr(), transient=True
    ) as bar:
        task = bar.add_task("answering", total=None)
        result = compare(
            model,
            against or [],
            plan,
            lambda name: _open(name, threads),
            lambda n: bar.advance(task, n),
            lambda n: bar.update(task, total=n),
        )
    show(result)
    if "skills" in result and not against and (hint := reference_hint(model)):
        _say(hint)
    _write_json(json_, result)


@app.command()
def probe(
    model: Annotated[str, typer.Argument(help="A bundle or a checkpoint.")],
    data: Annotated[
        str, typer.Option(help="scenes (held-out ones), or a file of samples.")
    ] = "scenes",
    limit: Annotated[int, typer.Option(help="Questions at most.")] = 300,
    seed: Annotated[
        int,
        typer.Option(
            min=0, max=999_999, help="Of the scenes, noise, orders, donors and intervals."
        ),
    ] = 0,
    only: Annotated[
        str | None,
        typer.Option(help="Some interventions alone, such as noise,donor_same_question."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Questions decoded together.")] = 16,
    html: Annotated[Path | None, typer.Option(help="Write a page with plots.")] = None,
    threads: Threads = None,
    json_: JsonOut = None,
) -> None:
    """Say whether the latents carry the answer: replace them by others and see what becomes of it.

    Example: lvr-lite probe bundle --limit 300 --html probe.html
    """
    from lvr_lite.eval import probe as probing
    from lvr_lite.eval.report import show_probe, write_probe_page

    names = probing.chosen(only)
    items = probing.load_items(data, limit, seed)
    runtime = _open(model, threads)
    from rich.progress import Progress

    with Progress(console=_stderr(), transient=True) as bar:
        task = bar.add_task("answering", total=None)
        result = probing.probe(
            runtime,
            items,
            names,
            seed,
            batch,
            lambda done, total: bar.update(task, completed=done, total=total),
        )
    result["data"] = data
    if data == "scenes":
        result["seeds"]["scenes"] = seed
    show_probe(result)
    if changed := result["interventions"].get("self", {}).get("changed_count"):
        _say(
            f"warning: the sham changed {changed} answers, so differences of that size mean nothing"
        )
    if html is not None:
        write_probe_page(result, html)
    _write_json(json_, result)


def _stderr() -> Any:
    from rich.console import Console

    return Console(stderr=True)


@app.command("bench")
def bench_(
    what: Annotated[
        list[str],
        typer.Argument(
            metavar="BUNDLE | compare A.json B.json | table FILES",
            help="A bundle, a checkpoint, or runs that --json wrote.",
        ),
    ],
    vs: Annotated[
        list[str] | None,
        typer.Option("--vs", help="Another bundle or checkpoint, measured in the same rounds."),
    ] = None,
    runs: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Timed requests per system; by default 20, and more until 15 seconds have passed.",
        ),
    ] = None,
    warmup: Annotated[int, typer.Option(min=0, help="Untimed requests per system.")] = 3,
    tokens: Annotated[int, typer.Option(min=1, help="Text tokens of every answer.")] = 16,
    steps: Annotated[
        str | None,
        typer.Option(help="Latent steps, several with commas: 0,4,8; the model's own by default."),
    ] = None,
    image_tokens: Annotated[
        str | None, typer.Option(help="Visual tokens that pictures are scaled to: 64,256,1024.")
    ] = None,
    batch: Annotated[str, typer.Option(help="Requests decoded together: 1,4,8.")] = "1",
    image: Annotated[
        Path | None, typer.Option(help="A picture to ask about; drawn scenes by default.")
    ] = None,
    question: Annotated[str, typer.Option(help="The question for --image.")] = "describe",
    limit: Annotated[
        int, typer.Option(min=0, help="Held-out scenes to score beside the speed; 0 for none.")
    ] = 0,
    provider: Provider = "cpu",
    threads: Threads = None,
    tolerance: Annotated[
        float,
        typer.Option(min=0.0, help="compare: what a median may move without being called changed."),
    ] = 0.05,
    html: Annotated[Path | None, typer.Option(help="Write a page with plots.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Write every raw sample.")] = None,
    json_: JsonOut = None,
) -> None:
    """Measure latency by stage, memory and answers, interleaved, with a machine card; the last line
    of stdout is JSON. Of files that --json wrote, `bench compare` says what changed beyond noise,
    and exits 1 where something became slower; `bench table` shows several machines in one table
    (Markdown).

    Example: lvr-lite bench int8 --vs int4 --runs 30 --steps 0,8 --html bench.html
    """
    from lvr_lite.errors import UsageError

    if what[0] == "compare":
        _compare_runs(what[1:], tolerance, json_)
        return
    if what[0] == "table":
        _show_machines(what[1:])
        return
    if len(what) > 1:
        raise UsageError(f"{what[1]}: one bundle is measured; name others with --vs")
    from lvr_lite.bench import machine, measure, report
    from lvr_lite.model.bundle import Bundle, is_bundle
    from lvr_lite.system import usable_cores

    axes = (
        _numbers("--steps", steps),
        _numbers("--image-tokens", image_tokens),
        _numbers("--batch", batch),
    )
    settings = tuple(
        measure.Setting(s, i, 1 if b is None else b)
        for b in axes[2]
        for i in axes[1]
        for s in axes[0]
    )
    cores = threads or usable_cores()
    seconds = 15.0 if runs is None else 0.0
    plan = measure.Plan(
        rounds=runs or 20,
        seconds=seconds,
        warmup=warmup,
        tokens=tokens,
        settings=settings,
        threads=cores,
    )
    requests = _requests(image, question)
    names = [what[0], *(vs or [])]
    systems = []
    for name in names:
        runtime = _open(name, threads, provider=provider if is_bundle(Path(name)) else "cpu")
        accuracy = _accuracy(runtime, limit) if limit else None
        graphs = (
            Bundle.open(Path(name), check=False).manifest.graphs if is_bundle(Path(name)) else {}
        )
        precision = Bundle.open(Path(name), check=False).manifest.precision if graphs else "fp32"
        sizes = {graph: g.bytes for graph, g in graphs.items()}
        folders = [Path(n).name for n in names]
        title = Path(name).name if folders.count(Path(name).name) == 1 else name.rstrip("/")
        systems.append(
            measure.System(
                title, precision, runtime, sizes, _rss_of_run(name, threads, provider), accuracy
            )
        )
    from rich.progress import Progress

    with Progress(console=_stderr(), transient=True) as bar:
        task = bar.add_task("measuring")
        measured = measure.measure(
            systems,
            requests,
            plan,
            lambda done, total: bar.update(task, completed=done, total=total),
        )
    card = {"provider": provider} | machine.card(
        cores, {n: Path(n) for n in names if is_bundle(Path(n))}
    )
    data = report.to_json(measured, card)
    from rich.console import Console

    report.show(data, Console())
    if html is not None:
        report.write_html(data, html)
    if csv is not None:
        report.write_csv(data, csv)
    _write_json(json_, data)
    print(json.dumps(data))


def _numbers(option: str, text: str | None) -> list[int | None]:
    """ "0,4,8" -> [0, 4, 8]; [None] where nothing was given. Raises UsageError for anything
    else.
    """
    from lvr_lite.errors import UsageError

    if text is None:
        return [None]
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(
            f"{option} {text}: give whole numbers with commas between, such as 0,4,8"
        ) from None
    if len(set(found)) < len(found):
        raise UsageError(f"{option} {text}: a number is there twice")
    return list(found)


def _show_machines(files: list[str]) -> None:
    from lvr_lite.bench import report
    from lvr_lite.errors import UsageError

    if not files:
        raise UsageError("bench table takes files that `lvr-lite bench --json` wrote")
    print(report.machines_table([(file, report.read(Path(file))) for file in files]))


def _compare_runs(files: list[str], tolerance: float, json_: Path | None) -> None:
    from rich.console import Console

    from lvr_lite.bench import compare, report
    from lvr_lite.errors import UsageError

    if len(files) != 2:
        raise UsageError(
            f"bench compare takes two files that `lvr-lite bench --json` wrote, not {len(files)}"
        )
    before, after = (report.read(Path(file)) for file in files)
    data = compare.compare(before, after, tolerance)
    compare.show(data, Console())
    _write_json(json_, data)
    if data["answers"] or any(row["verdict"] == "slower" for row in data["rows"]):
        raise typer.Exit(1)


def _accuracy(runtime: Runtime, limit: int) -> dict[str, Any]:
    from lvr_lite.eval.suite import evaluate, load_suite
    from lvr_lite.generate.decode import Options

    scored = evaluate(runtime, load_suite("scenes", limit), Options(max_tokens=16))
    return {"suite": "scenes"} | {k: scored[k] for k in ("n", "accuracy", "interval")}


def _requests(image: Path | None, question: str) -> list[Any]:
    from lvr_lite.bench.measure import Request
    from lvr_lite.eval.suite import load_suite
    from lvr_lite.model.images import open_picture

    if image is not None:
        return [Request(open_picture(image), question)]
    looked_at = [
        item for item in load_suite("scenes", 16) if item[0].boxes
    ]  # the others are answered without latents
    return [Request(pictures[0], sample.question) for sample, pictures in looked_at[:12]]


def _rss_of_run(model: str, threads: int | None, provider: str) -> float | None:
    """Peak RSS in MiB of `lvr-lite run` with this model, in a process of its own."""
    import subprocess
    import tempfile

    from lvr_lite.eval.suite import load_suite
    from lvr_lite.model.bundle import is_bundle

    with tempfile.TemporaryDirectory() as folder:
        sample, pictures = next(load_suite("scenes", 1))
        pictures[0].save(f"{folder}/picture.png")
        command = [
            sys.executable,
            "-m",
            "lvr_lite",
            "run",
            model,
            f"{folder}/picture.png",
            sample.question,
            "--json",
            f"{folder}/run.json",
        ]
        command += ["--provider", provider if is_bundle(Path(model)) else "cpu"]
        done = subprocess.run(
            command + (["--threads", str(threads)] if threads else []),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            from lvr_lite.errors import LvrError

            raise LvrError(
                f"{model}: `lvr-lite run` failed while its memory was measured: {done.stderr.strip().splitlines()[-1:]}"
            )
        return float(json.loads(Path(f"{folder}/run.json").read_text())["peak_rss_mb"])


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="A bundle or a checkpoint.")], json_: JsonOut = None
) -> None:
    """Show what is in a bundle or a checkpoint: graphs, precision, sizes, hashes, parity.

    Example: lvr-lite inspect bundle
    """
    from rich.console import Console

    from lvr_lite.commands.inspect import describe, render
    from lvr_lite.model.bundle import Bundle, is_bundle
    from lvr_lite.model.checkpoint import resolve

    folder = Path(model)
    description = describe(folder if is_bundle(folder) else resolve(model))
    render(description, Console())
    _write_json(json_, {"schema": "lvr-lite/inspect", "version": 1} | description)
    if description.get("intact") is False:
        Bundle.open(folder).manifest  # names the file that is missing or changed


@app.command()
def doctor(json_: JsonOut = None) -> None:
    """Say what this machine can do, what is missing, and the line that mends it.

    Example: lvr-lite doctor
    """
    from dataclasses import asdict

    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from lvr_lite.commands.doctor import checks

    found = checks()
    table = Table(box=None, show_header=False, pad_edge=False)
    for check in found:
        mark = {True: "[green]ok[/]", False: "[red]no[/]", None: "[dim]–[/]"}[check.ok]
        table.add_row(
            mark,
            escape(check.name),
            escape(check.detail),
            f"[bold]{escape(check.mend)}[/]" if check.mend else "",
        )
    Console().print(table)
    _write_json(
        json_, {"schema": "lvr-lite/doctor", "version": 1, "checks": [asdict(c) for c in found]}
    )
    if any(check.ok is False for check in found):
        raise typer.Exit(1)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for checkpoint, bundles and report.")] = Path(
        "demo-out"
    ),
    quick: Annotated[
        bool, typer.Option("--quick", help="A few steps and questions: does everything run?")
    ] = False,
) -> None:
    """The whole job on the embedded model and scenes; ends with a table and a report page.

    Example: lvr-lite demo --out demo-out
    """
    from lvr_lite.commands.demo import run_demo

    run_demo(out, quick)


@data_app.command("make")
def data_make(
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    count: Annotated[int, typer.Option(min=1, help="Questions.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, max=999_999, help="Of the scenes.")] = 0,
    split: Annotated[str, typer.Option(help="train or test.")] = "train",
    as_: Annotated[
        str, typer.Option("--as", help="samples, or coco: a detection set, to try data convert on.")
    ] = "samples",
) -> None:
    """Write drawn scenes with questions and boxes as PNG and JSONL.

    Example: lvr-lite data make --out scenes --count 200 --seed 1 --split test
    """
    from lvr_lite.errors import UsageError
    from lvr_lite.toy.make import write_scenes

    if split not in ("train", "test"):
        raise UsageError(f"--split {split}: must be train or test")
    if as_ not in ("samples", "coco"):
        raise UsageError(f"--as {as_}: must be samples or coco")
    _say(
        f"{write_scenes(out, count, seed, split, as_ == 'coco')}: {count} {'pictures' if as_ == 'coco' else 'questions'}"
    )


@data_app.command("convert")
def data_convert(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="FROM",
            help="COCO, Label Studio, LVR: JSON; Visual-CoT: JSONL; YOLO: folder or data.yaml.",
        ),
    ],
    target: Annotated[
        Path, typer.Argument(metavar="TO", help="JSONL to write; pictures stay where they are.")
    ],
    form: Annotated[str, typer.Option("--from", help="coco, yolo, labelstudio, viscot or lvr.")],
    images: Annotated[
        Path | None, typer.Option(help="Folder of the pictures; that of FROM by default.")
    ] = None,
    boxes_are: Annotated[
        str | None,
        typer.Option(
            help="stored or upright: pixels that boxes are of, where EXIF turns pictures; found out by their size, else upright."
        ),
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="For yolo and viscot: only this one of their own splits.")
    ] = None,
    test_share: Annotated[
        float | None,
        typer.Option(
            help="Hold out this share of the pictures: writes TO-train.jsonl and TO-test.jsonl in place of TO.jsonl."
        ),
    ] = None,
    per_image: Annotated[
        int, typer.Option(min=1, help="Most questions made of one picture's classes.")
    ] = 6,
    seed: Annotated[
        int, typer.Option(min=0, help="Of the questions and of the held-out share.")
    ] = 0,
    absent: Annotated[
        bool, typer.Option(help="Also ask about classes that are not there; these have no boxes.")
    ] = True,
    skip_broken: Annotated[
        bool,
        typer.Option("--skip-broken", help="Leave broken rows out, instead of writing nothing."),
    ] = False,
) -> None:
    """Turn other data sets into samples; where they have only boxes with classes, questions are
    made of these.

    Example: lvr-lite data convert --from coco annotations/instances_train.json set.jsonl
    --test-share 0.1
    """
    from lvr_lite.data.convert.convert import Options, convert

    options = Options(images, boxes_are, split, test_share, per_image, seed, absent)
    written, problems = convert(source, target, form, options, skip_broken)
    for problem in problems:
        print(problem)
    if written is None:
        _say(
            f"{source}: {len(problems)} broken rows, nothing was written; mend them, or leave them out with --skip-broken"
        )
        raise typer.Exit(1)
    _say(str(written))


@data_app.command("validate")
def data_validate(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE...", help="Files of samples; those given together may share no picture."
        ),
    ],
    against_test: Annotated[
        Path | None, typer.Option(help="A test set none of whose pictures may be in them.")
    ] = None,
    model: Model = "tiny",
) -> None:
    """Report every problem of data files with file, line and field; exit code 1 if there is one.
    Notes are no problems.

    Example: lvr-lite data validate train.jsonl --against-test test.jsonl
    """
    from lvr_lite.data.validate import validate
    from lvr_lite.model.checkpoint import processor_of

    wrong = False
    for file, (good, found) in zip(
        files, validate(files, processor_of(model), against_test), strict=True
    ):
        for problem in found:
            print(problem)
        problems = sum(not problem.note for problem in found)
        notes = f", {len(found) - problems} notes" if len(found) > problems else ""
        _say(f"{file}: {good} good samples, {problems} problems{notes}")
        wrong |= problems > 0
    if wrong:
        raise typer.Exit(1)


@data_app.command("preview")
def data_preview(
    file: Annotated[Path, typer.Argument(help="A file of samples.")],
    out: Annotated[Path, typer.Option(help="PNG to write.")] = Path("preview.png"),
    count: Annotated[int, typer.Option(min=1, help="Samples to show.")] = 12,
    model: Model = "tiny",
) -> None:
    """Draw samples as the model sees them, with their boxes and the visual tokens that these
    select.

    Example: lvr-lite data preview scenes/test.jsonl --out preview.png
    """
    from lvr_lite.data.samples import read_samples
    from lvr_lite.model.checkpoint import processor_of
    from lvr_lite.views.preview import preview

    samples = read_samples(file)
    preview(samples, count, out, processor_of(model))
    _say(f"{out}: {min(count, len(samples))} of {len(samples)} samples")


@app.callback(invoke_without_command=True)
def _top(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    if version:
        from lvr_lite import __version__

        print(f"lvr-lite {__version__}")
        raise typer.Exit
