"""What `lvr-lite export --for hf` writes, read by transformers and by llama.cpp: the same greedy
tokens as `lvr-lite eval` without latents?

    python -m lvr_lite.bench.experiments.hf_export --out build/hf --page docs/results/hf.md
    LVR_PUBLISHED=FOLDER ... --shape Qwen2.5-VL-3B-Instruct --tokens 4
    ... --llama-cpp SOURCE --llama-python PYTHON

LVR_PUBLISHED holds a folder of small files for each published model, whose weights are random here.
SOURCE is llama.cpp's, which lies in the source distribution of llama-cpp-python (vendor/llama.cpp);
PYTHON has that package. May be run again for what is missing.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image

from lvr_lite.bench.experiments import tiny
from lvr_lite.bench.experiments.hf_export.folders import doubled, random_checkpoint
from lvr_lite.bench.experiments.runner import (
    Out,
    Page,
    is_whole,
    launch,
    once,
    publish,
    read_json,
    table,
    write_json,
    write_results,
)
from lvr_lite.eval.plan import load_suite
from lvr_lite.eval.suite import evaluate
from lvr_lite.generate.decode import Options
from lvr_lite.generate.torch import TorchRuntime
from lvr_lite.model.checkpoint import Checkpoint, read_checkpoint
from lvr_lite.model.prompt import render
from lvr_lite.train.load import load_merged

HERE = Path(__file__).parent
PUBLISHED = "LVR_PUBLISHED"
MEDIA = "<__media__>"
TITLES = ("model", "read by", "in", "scenes", "the same prompt", "the same tokens", "accuracy")


@dataclass(frozen=True)
class Agreement:
    """Of another reader of the folder with the decode loop.

    prompts, answers: how many are the same, token by token.
    accuracy: (ours, theirs) of these scenes.
    """

    model: str
    reader: str
    types: str
    scenes: int
    prompts: int
    answers: int
    accuracy: tuple[float, float]

    def row(self) -> list[str]:
        ours, theirs = self.accuracy
        return [
            self.model,
            self.reader,
            self.types,
            str(self.scenes),
            f"{self.prompts} of {self.scenes}",
            f"{self.answers} of {self.scenes}",
            f"{ours:.3f}, {theirs:.3f}",
        ]


@dataclass(frozen=True)
class Asked:
    """The scenes as files, and the decode loop's answers to them without latents.

    prompts: ids without those of visual tokens.
    """

    questions: list[dict[str, object]]
    prompts: list[list[int]]
    tokens: list[list[int]]
    expected: list[str]


def ask(checkpoint: Checkpoint, folder: Path, scenes: int, tokens: int) -> Asked:
    """Answer held-out scenes, and write their pictures and questions for other readers."""
    folder.mkdir(parents=True, exist_ok=True)
    runtime = TorchRuntime(load_merged(checkpoint), checkpoint)
    processor = runtime.processor
    items = list(islice(load_suite("scenes", scenes), scenes))
    report = evaluate(runtime, items, Options(max_tokens=tokens, look="never"))
    special = processor.tokens
    never = [special.image, special.lvr_start, special.lvr, special.lvr_end]
    questions: list[dict[str, object]] = []
    prompts = []
    for number, (sample, (picture,)) in enumerate(items):
        path = folder / f"{number}.png"
        picture.save(path)
        text = render(processor.template, sample.question, 1)
        questions.append(
            {
                "picture": str(path),
                "question": sample.question,
                "prompt": text.replace("<|vision_start|><|image_pad|><|vision_end|>", MEDIA),
                "never": never,
                "ends": list(special.end),
            }
        )
        grid = processor.grid_of(picture.height, picture.width)
        prompts.append(processor.prompt(sample.question, [grid]).ids.tolist())
    chosen = [answer["tokens"] for answer in report["answers"]]
    return Asked(questions, prompts, chosen, [sample.answer for sample, _ in items])


def spaced(text: str) -> str:
    """A prompt of the embedded model with the spaces that its tokenizer puts after special tokens
    by itself, which llama.cpp's does not.
    """
    for special in ("<|im_start|>", MEDIA):
        text = text.replace(special, f"{special} ")
    return text


def double(question: dict[str, object]) -> dict[str, object]:
    """A question about the picture of twice the size."""
    path = Path(str(question["picture"]))
    picture = Image.open(path)
    size = (picture.width * 2, picture.height * 2)
    target = path.with_name(f"{path.stem}-double.png")
    picture.resize(size, Image.Resampling.NEAREST).save(target)
    return question | {"picture": str(target), "prompt": spaced(str(question["prompt"]))}


def read_by(command: Sequence[object], questions: list[dict[str, object]], out: Path) -> list[dict]:
    """The answers of another reader, in a process of its own. command: all before the questions."""
    asked = out.with_suffix(".questions.json")
    write_json(asked, questions)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    *words, tokens = command
    line = [*map(str, words), str(asked), str(out), str(tokens)]
    if not is_whole(out):
        subprocess.run(line, check=True, env=environment)
    answers: list[dict] = read_json(out)["answers"]
    return answers


def compare(
    model: str,
    reader: str,
    types: str,
    checkpoint: Checkpoint,
    asked: Asked,
    answers: list[dict],
    texts_only: bool,
) -> Agreement:
    """texts_only: the reader's prompts have no ids for visual tokens."""
    from lvr_lite.eval.score import is_correct

    processor = checkpoint.processor
    image = processor.tokens.image

    def accuracy(tokens: list[list[int]]) -> float:
        pairs = zip(tokens, asked.expected, strict=True)
        return sum(is_correct(processor.text(t), answer) for t, answer in pairs) / len(tokens)

    count = len(answers)
    ours = [[i for i in p if i != image] if texts_only else p for p in asked.prompts[:count]]
    asked = Asked(asked.questions, ours, asked.tokens[:count], asked.expected[:count])
    theirs = [answer["tokens"] for answer in answers]
    return Agreement(
        model=model,
        reader=reader,
        types=types,
        scenes=count,
        prompts=sum(a == b["prompt"] for a, b in zip(asked.prompts, answers, strict=True)),
        answers=sum(a == b for a, b in zip(asked.tokens, theirs, strict=True)),
        accuracy=(accuracy(asked.tokens), accuracy(theirs)),
    )


def convert(source: Path, folder: Path, target: Path, types: str) -> tuple[Path, Path]:
    """GGUF and mmproj of a folder by llama.cpp's converter."""
    files = (target / f"{types}.gguf", target / f"mmproj-{types}.gguf")
    for file, more in zip(files, ((), ("--mmproj",)), strict=True):
        if not is_whole(file):
            words = [folder, "--outtype", types, "--outfile", file, *more]
            line = [sys.executable, HERE / "converter.py", source, *words]
            subprocess.run(list(map(str, line)), check=True)
    return files


def measure(
    name: str,
    checkpoint: Checkpoint,
    out: Path,
    scenes: int,
    tokens: int,
    llama: tuple[Path, str] | None,
    llama_scenes: int,
    types: Sequence[str],
) -> list[Agreement]:
    """One model, by each reader. llama: source and Python of llama.cpp."""
    log = out / "log.txt"
    folder = out / "hf"
    arguments = ("export", checkpoint.folder, folder, "--for", "hf", "--precision", "fp32")
    once(folder / "lvr_export.json", *arguments, log=log)
    asked = ask(checkpoint, out / "scenes", scenes, tokens)
    reader = (sys.executable, HERE / "reader.py", folder, tokens)
    answers = read_by(reader, asked.questions, out / "transformers.json")
    rows = [compare(name, "transformers", "fp32", checkpoint, asked, answers, False)]
    if llama is None:
        return rows
    source, python = llama
    questions = asked.questions[:llama_scenes]
    embedded = checkpoint.config["vision_config"].get("window_size") == 56
    if embedded:
        doubled(folder, out / "hf-double")
        folder = out / "hf-double"
        questions = [double(question) for question in questions]
    for kind in types:
        files = convert(source, folder, out, kind)
        worker = (python, HERE / "llama.py", *files, tokens)
        answers = read_by(worker, questions, out / f"llama-{kind}.json")
        rows.append(compare(name, "llama.cpp", kind, checkpoint, asked, answers, True))
    return rows


def main(
    out: Out,
    tuned: Annotated[Path | None, typer.Option(help="A tuned embedded model.")] = None,
    shape: Annotated[str | None, typer.Option(help="A folder of LVR_PUBLISHED.")] = None,
    scenes: int = 200,
    tokens: Annotated[int, typer.Option(help="Of an answer at most.")] = 16,
    llama_cpp: Annotated[Path | None, typer.Option(help="llama.cpp's source.")] = None,
    llama_python: Annotated[str, typer.Option(help="Has llama-cpp-python.")] = sys.executable,
    llama_scenes: int = 50,
    types: Annotated[str, typer.Option(help="Of GGUF, with commas between.")] = "f32,f16,q8_0",
    page: Page = None,
) -> None:
    if shape is None:
        name = "embedded, tuned"
        folder = tuned or out / "tuned"
        if tuned is None:
            tiny.finetune(folder, out / "tuned.json", "lvr-free")
        out = out / "embedded"
    else:
        name = f"{shape}, random weights"
        out = out / shape
        folder = out / "base"
        random_checkpoint(Path(os.environ[PUBLISHED]) / shape, folder)
    out.mkdir(parents=True, exist_ok=True)
    llama = None
    if llama_cpp is not None:
        llama = (llama_cpp, llama_python)
    rows = measure(
        name,
        read_checkpoint(folder),
        out,
        scenes,
        tokens,
        llama,
        llama_scenes,
        types.split(","),
    )
    text = table(TITLES, [agreement.row() for agreement in rows])
    print(text)
    write_results(out / "hf.json", {"agreements": [asdict(row) for row in rows]}, 1)
    publish(text, page, f"hf_export {name}")
    if page is not None:
        results = page.with_suffix(".json")
        known = read_json(results) if is_whole(results) else {}
        write_json(results, known | {name: read_json(out / "hf.json")})


if __name__ == "__main__":
    launch(main, __doc__)
