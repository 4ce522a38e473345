"""Latent visual reasoning: fine-tune a small vision-language model on one GPU, export it to ONNX,
run and measure it quantized on a device.

Each command of `lvr-lite` is a function here; its options are a dataclass, and what it returns has
`to_json()`. Nothing heavy is imported before a function is used.

Ask:
    model = lvr_lite.open_model("int8")
    model.ask(["picture.png"], "what colour is the star").text
    for event in model.stream(["picture.png"], "what colour is the star"):
        print(event.text, end="")
    model.ask(["picture.png"], "where heart", lvr_lite.AskOptions(steps=0))
    model.look(model.ask(["picture.png"], "where heart")).save("look.png")

Train, export, quantize (these need `pip install "lvr-lite[train,export]"`):
    options = lvr_lite.TrainOptions(overrides=("train.steps=9",))
    lvr_lite.finetune("tiny", "scenes", "tuned", options)
    lvr_lite.grpo("tuned", "scenes", "reinforced")
    lvr_lite.plan_finetune("tiny"), lvr_lite.plan_grpo("tuned")
    lvr_lite.export_model("tuned", "fp32", lvr_lite.Rounding("fp32"))
    lvr_lite.export_hf("tuned", "tuned-hf")
    lvr_lite.quantize("fp32", "int4", lvr_lite.Rounding("int4", block=32))
    lvr_lite.export_synthetic("qwen2-vl-2b", "random", lvr_lite.Rounding("int8"))

Measure:
    lvr_lite.evaluate("int8", lvr_lite.EvalOptions(limit=100), against=["tiny"]).accuracy
    lvr_lite.probe("int8", lvr_lite.ProbeOptions(limit=100)).verdict
    lvr_lite.benchmark("int8", lvr_lite.BenchOptions(vs=("int4",))).to_json()
    lvr_lite.compare_benchmarks("before.json", "after.json").regressed
    lvr_lite.table_of_benchmarks(["desktop.json", "laptop.json"])

Data:
    lvr_lite.make_data("scenes", lvr_lite.MakeOptions(count=200, split="test"))
    lvr_lite.convert_data("coco.json", "set.jsonl", "coco", lvr_lite.ConvertOptions(test_share=0.1))
    all(file.valid for file in lvr_lite.validate_data(["set-train.jsonl"], "set-test.jsonl"))
    lvr_lite.preview_data("set-test.jsonl", "preview.png")

Look around:
    lvr_lite.inspect("int8"), lvr_lite.doctor().healthy, lvr_lite.demo("demo-out", quick=True)

What a caller can mend is raised as `lvr_lite.LvrError`. `lvr-lite export` and `bench` are
`export_model` and `benchmark`, since `lvr_lite.export` and `lvr_lite.bench` are packages.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lvr_lite.bench.compare import Comparison
    from lvr_lite.bench.record import Benchmark
    from lvr_lite.commands.bench import (
        BenchOptions,
        benchmark,
        compare_benchmarks,
        table_of_benchmarks,
    )
    from lvr_lite.commands.data import (
        Conversion,
        ConvertOptions,
        MakeOptions,
        Validation,
        convert_data,
        make_data,
        preview_data,
        validate_data,
    )
    from lvr_lite.commands.demo import Demo, demo
    from lvr_lite.commands.doctor import Diagnosis, doctor
    from lvr_lite.commands.evaluate import (
        EvalOptions,
        Evaluation,
        ProbeOptions,
        Probing,
        evaluate,
        probe,
    )
    from lvr_lite.commands.export import (
        Rounding,
        Written,
        export_hf,
        export_model,
        export_synthetic,
        quantize,
    )
    from lvr_lite.commands.inspect import BundleContents, CheckpointContents, inspect
    from lvr_lite.commands.model import Answer, AnswerEvent, AskOptions, Model, open_model
    from lvr_lite.commands.train import (
        Training,
        TrainOptions,
        finetune,
        grpo,
        plan_finetune,
        plan_grpo,
    )
    from lvr_lite.errors import LvrError

__version__ = "0.1.0"

# Where each name is defined; a module is imported when one of its names is first used.
_MODULES = {
    "bench.compare": ("Comparison",),
    "bench.record": ("Benchmark",),
    "commands.bench": (
        "BenchOptions",
        "benchmark",
        "compare_benchmarks",
        "table_of_benchmarks",
    ),
    "commands.data": (
        "Conversion",
        "ConvertOptions",
        "MakeOptions",
        "Validation",
        "convert_data",
        "make_data",
        "preview_data",
        "validate_data",
    ),
    "commands.demo": ("Demo", "demo"),
    "commands.doctor": ("Diagnosis", "doctor"),
    "commands.evaluate": (
        "EvalOptions",
        "Evaluation",
        "ProbeOptions",
        "Probing",
        "evaluate",
        "probe",
    ),
    "commands.export": (
        "Rounding",
        "Written",
        "export_hf",
        "export_model",
        "export_synthetic",
        "quantize",
    ),
    "commands.inspect": ("BundleContents", "CheckpointContents", "inspect"),
    "commands.model": ("Answer", "AnswerEvent", "AskOptions", "Model", "open_model"),
    "commands.train": (
        "TrainOptions",
        "Training",
        "finetune",
        "grpo",
        "plan_finetune",
        "plan_grpo",
    ),
    "errors": ("LvrError",),
}
__all__ = [
    "Answer",
    "AnswerEvent",
    "AskOptions",
    "BenchOptions",
    "Benchmark",
    "BundleContents",
    "CheckpointContents",
    "Comparison",
    "Conversion",
    "ConvertOptions",
    "Demo",
    "Diagnosis",
    "EvalOptions",
    "Evaluation",
    "LvrError",
    "MakeOptions",
    "Model",
    "ProbeOptions",
    "Probing",
    "Rounding",
    "TrainOptions",
    "Training",
    "Validation",
    "Written",
    "benchmark",
    "compare_benchmarks",
    "convert_data",
    "demo",
    "doctor",
    "evaluate",
    "export_hf",
    "export_model",
    "export_synthetic",
    "finetune",
    "grpo",
    "inspect",
    "make_data",
    "open_model",
    "plan_finetune",
    "plan_grpo",
    "preview_data",
    "probe",
    "quantize",
    "table_of_benchmarks",
    "validate_data",
]


def __getattr__(name: str) -> object:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
