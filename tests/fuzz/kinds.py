"""The kinds of inputs: for each a hypothesis strategy of cases, over the real files.

Whoever changes a file of a bundle writes its sums anew, so that what reads the file is reached, and
not the check of the sums alone. May import: hypothesis, onnx, the standard library.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Callable
from typing import Any

import onnx
from hypothesis import strategies as st

from tests.fuzz.mutate import (
    NUMBERS,
    TEXTS,
    Draw,
    changed_bytes,
    changed_json,
    json_file,
    json_lines_file,
    text_file,
    to_bytes,
    values,
)
from tests.fuzz.originals import FOREIGN, Originals
from tests.fuzz.watch import SECRET, Case

Commands = tuple[tuple[str, ...], ...]

PICTURE = "IN/scenes/images/test-0-000000.png"
INSPECT = ("inspect", "IN/model", "--json", "OUT/inspect.json")
PROCESSOR = ("data", "preview", "IN/scenes/test.jsonl", "--out", "OUT/p.png", "--model", "IN/model")
RUN = ("run", "IN/model", PICTURE, "what colour is the circle", "--look", "always")
QUANTIZE = ("quantize", "IN/model", "OUT/int8")
PLAN = ("finetune", "--model", "IN/model", "--plan")
PLACES = (
    "../secret", "../../secret", "/etc/passwd", "", ".", "..", "/", "onnx", "decoder.onnx",
    "decoder.onnx_data", "../lvr.json", "../onnx/decoder.onnx_data", "x.onnx_data", "a\0b",
    "lm_head.onnx_data", "\\\\host\\share\\x", "..\\..\\secret", "link", "x" * 300,
)  # fmt: skip


# --------------------------------------------------------------------------------------- pictures


@st.composite
def pictures(draw: Draw, originals: Originals) -> Case:
    """A changed picture, or one that lies about its size, or of a foreign format under any name."""
    name = draw(st.sampled_from(sorted(originals.pictures)))
    data = originals.pictures[name]
    how = draw(st.sampled_from(("bytes", "bytes", "header", "header", "sizes", "as it is")))
    if how == "bytes":
        data = draw(changed_bytes(data))
    elif how == "header":
        data = draw(changed_bytes(data, near=120))
    elif how == "sizes":
        data = draw(_sized())
        name = "a.png"
    endings = ("png", "jpg", "webp", "bmp", "gif", "tiff", "avif", name.rpartition(".")[2])
    name = f"a.{draw(st.sampled_from(endings))}"
    line: dict[str, object] = {"id": "1", "image": name, "question": "what?", "answer": "x"}
    line |= {"boxes": [[0.1, 0.1, 0.9, 0.9]]}
    files = {f"in/{name}": data, "in/s.jsonl": json.dumps(line).encode()}
    preview = ("data", "preview", "IN/s.jsonl", "--out", "OUT/p.png")
    return Case("pictures", None, files, (("data", "validate", "IN/s.jsonl"), preview))


@st.composite
def _sized(draw: Draw) -> bytes:
    """A PNG whose header says a drawn size, with sound sums and some or all of its pixels."""
    sizes = (1, 2, 64, 4000, 13_000, 16_384, 25_000, 65_000, 100_000, 2**31 - 1)
    width = draw(st.sampled_from(sizes))
    height = draw(st.sampled_from(sizes))
    depth, colour = draw(
        st.sampled_from(((1, 0), (8, 0), (16, 0), (8, 2), (8, 3), (8, 6), (16, 6)))
    )
    channels = {0: 1, 2: 3, 3: 1, 6: 4}[colour]
    row = 1 + (width * channels * depth + 7) // 8
    # At most 300 MB of zeros, which are packed to less than 300 kB.
    rows = min(height, draw(st.sampled_from((0, 1, 10**9))), 300_000_000 // row)
    packer = zlib.compressobj(1)
    zeros = bytes(min(row, 1 << 20))
    left = rows * row
    packed = b""
    while left > 0:
        packed += packer.compress(zeros[:left])
        left -= len(zeros)
    packed += packer.flush()
    interlaced = draw(st.sampled_from((0, 1)))
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
    chunks = [(b"IHDR", header), (b"IDAT", packed), (b"IEND", b"")]
    extra = draw(st.sampled_from((None, b"tEXt", b"iCCP", b"zTXt", b"eXIf", b"acTL")))
    if extra:
        bomb = b"x\0\0" + zlib.compress(bytes(draw(st.sampled_from((10, 50_000_000)))))
        chunks.insert(1, (extra, bomb))
    if colour == 3:
        chunks.insert(1, (b"PLTE", bytes(6)))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*chunk) for chunk in chunks)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@st.composite
def foreign_pictures(draw: Draw, originals: Originals) -> Case:
    """A sound picture of a format that is not read, called as one that is; PostScript above all."""
    scripts = (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n",
        b"\xc5\xd0\xd3\xc6" + bytes(60) + b"%!PS-Adobe\n%%BoundingBox: 0 0 9 9\n",
        b"%PDF-1.4\n1 0 obj<<>>endobj\ntrailer<<>>\n%%EOF",
        b"\xd7\xcd\xc6\x9a" + bytes(100),
        b"P6 99999 99999 255\n",
        b"<svg xmlns='http://www.w3.org/2000/svg'><image href='/etc/passwd'/></svg>",
    )
    stored = [data for name, data in originals.pictures.items() if name.startswith(FOREIGN)]
    data = draw(st.sampled_from((*scripts, *stored)))
    name = f"a.{draw(st.sampled_from(('png', 'jpg', 'gif', 'tiff', 'webp')))}"
    line = {"id": "1", "image": name, "question": "what?", "answer": "x", "boxes": []}
    files = {f"in/{name}": data, "in/s.jsonl": json.dumps(line).encode()}
    return Case("pictures", None, files, (("data", "validate", "IN/s.jsonl"),))


# ------------------------------------------------------------------------------------------- data


@st.composite
def samples(draw: Draw, originals: Originals) -> Case:
    changed = draw(json_lines_file(originals.files["samples.jsonl"]))
    commands = (
        ("data", "validate", "IN/test.jsonl"),
        ("data", "preview", "IN/test.jsonl", "--out", "OUT/p.png"),
    )
    return Case("samples", "scenes", {"in/test.jsonl": changed}, commands)


def _converted(kind: str, source: str, *more: str) -> Commands:
    target = "OUT/set.jsonl"
    convert = ("data", "convert", source, target, "--from", kind)
    return ((*convert, *more), (*convert, "--skip-broken", *more))


@st.composite
def coco(draw: Draw, originals: Originals) -> Case:
    changed = draw(json_file(originals.files["coco.json"]))
    return Case("coco", "coco", {"in/train.json": changed}, _converted("coco", "IN/train.json"))


@st.composite
def yolo(draw: Draw, originals: Originals) -> Case:
    files = {}
    for name in draw(
        st.lists(
            st.sampled_from(("data.yaml", "labels/a.txt", "labels/b.txt")), min_size=1, max_size=2
        )
    ):
        files[f"in/{name}"] = draw(text_file(originals.files[f"data/{name}"]))
    if draw(st.integers(0, 3)) == 0:
        changed = draw(changed_json({"path": ".", "train": "images", "names": {"0": "cat"}}))
        files["in/data.yaml"] = to_bytes(changed)
    return Case("yolo", "data", files, _converted("yolo", "IN/data.yaml"))


@st.composite
def labelstudio(draw: Draw, originals: Originals) -> Case:
    changed = draw(json_file(originals.files["data/labelstudio.json"]))
    files = {"in/labelstudio.json": changed}
    return Case("labelstudio", "data", files, _converted("labelstudio", "IN/labelstudio.json"))


@st.composite
def lvr(draw: Draw, originals: Originals) -> Case:
    files = {"in/lvr.json": draw(json_file(originals.files["data/lvr.json"]))}
    commands = (*_converted("lvr", "IN/lvr.json"), ("data", "validate", "IN/lvr.json"))
    return Case("lvr", "data", files, commands)


@st.composite
def viscot(draw: Draw, originals: Originals) -> Case:
    files = {"in/viscot.jsonl": draw(json_lines_file(originals.files["data/viscot.jsonl"]))}
    return Case("viscot", "data", files, _converted("viscot", "IN/viscot.jsonl"))


@st.composite
def benchmarks(draw: Draw, originals: Originals) -> Case:
    names = sorted(name for name in originals.files if name.startswith("benchmarks/"))
    name = draw(st.sampled_from(names)).removeprefix("benchmarks/")
    data = originals.files[f"benchmarks/{name}"]
    if name.endswith(".jsonl"):
        changed = draw(json_lines_file(data))
    elif name.endswith(".parquet"):
        changed = draw(changed_bytes(data))
    else:
        changed = draw(text_file(data))
    folder = name.partition("/")[0]
    suite = folder.removesuffix("-parquet")
    ask = ("eval", "IN/model", "--suite", suite, "--path", f"IN/{folder}", "--limit", "2")
    return Case("benchmarks", "benchmarks", {f"in/{name}": changed}, (ask,))


# ---------------------------------------------------------------------------------------- bundles


@st.composite
def manifests(draw: Draw, originals: Originals) -> Case:
    changed = draw(json_file(originals.files["fp32/lvr.json"]))
    files = {"in/model/lvr.json": changed}
    if draw(st.integers(0, 5)) == 0:
        files["in/model/report.json"] = draw(json_file(originals.files["fp32/report.json"]))
    return Case("manifests", "fp32", files, (INSPECT, RUN, QUANTIZE))


def _with_sums(originals: Originals, changed: dict[str, bytes]) -> dict[str, bytes]:
    """Files of the fp32 bundle with the manifest that names their sha256."""
    manifest = json.loads(originals.files["fp32/lvr.json"])
    for graph in manifest["graphs"].values():
        for name in graph["files"]:
            if name in changed:
                graph["files"][name] = hashlib.sha256(changed[name]).hexdigest()
        if unlisted := {n for n in changed if n.startswith("onnx/x")}:
            graph["files"] |= {n: hashlib.sha256(changed[n]).hexdigest() for n in unlisted}
    files = {f"in/model/{name}": data for name, data in changed.items()}
    return files | {"in/model/lvr.json": to_bytes(manifest)}


GRAPHS = ("vision_encoder", "embed_tokens", "decoder", "lm_head")


@st.composite
def graphs(draw: Draw, originals: Originals) -> Case:
    """A graph changed byte by byte, near its beginning (nodes) or anywhere."""
    name = f"onnx/{draw(st.sampled_from(GRAPHS))}.onnx"
    data = originals.files[f"fp32/{name}"]
    changed = draw(changed_bytes(data, near=draw(st.sampled_from((None, 300, 3000)))))
    files = _with_sums(originals, {name: changed})
    return Case("graphs", "fp32", files, (INSPECT, QUANTIZE, RUN))


@st.composite
def external_data(draw: Draw, originals: Originals) -> Case:
    """A graph whose weights are said to lie elsewhere, to be of another size, type or shape."""
    name = f"onnx/{draw(st.sampled_from(GRAPHS))}.onnx"
    model = onnx.ModelProto.FromString(originals.files[f"fp32/{name}"])
    outside = [t for t in model.graph.initializer if t.external_data]
    tensors = outside or list(model.graph.initializer)
    for _ in range(draw(st.integers(1, 2))):
        tensor = draw(st.sampled_from(tensors))
        how = draw(
            st.sampled_from(("location", "location", "number", "dims", "type", "key", "drop"))
        )
        _change_tensor(draw, tensor, how)
    files = _with_sums(originals, {name: model.SerializeToString()})
    links = {}
    if draw(st.integers(0, 3)) == 0:
        links["in/model/onnx/link"] = draw(st.sampled_from((f"../../../{SECRET}", "/etc/passwd")))
    return Case("external data", "fp32", files, (QUANTIZE, RUN), links)


def _change_tensor(draw: Draw, tensor: Any, how: str) -> None:
    entries = {entry.key: entry for entry in tensor.external_data}
    if how == "location" and "location" in entries:
        entries["location"].value = draw(st.sampled_from(PLACES))
    elif how == "number" and entries:
        key = draw(st.sampled_from(sorted(entries)))
        entries[key].value = str(draw(st.sampled_from((*NUMBERS, "x", "", "1.5", " 7"))))[:40]
    elif how == "dims":
        fits = [n for n in NUMBERS if -(2**63) <= n < 2**63]
        tensor.dims[:] = draw(st.lists(st.sampled_from(fits), max_size=4))
    elif how == "type":
        tensor.data_type = draw(st.integers(0, 30))
    elif how == "key":
        tensor.external_data.add(key=draw(st.sampled_from(("location", "offset", "x"))), value="0")
    else:
        del tensor.external_data[:]


# ------------------------------------------------------------------------------------ checkpoints


def _of_checkpoint(kind: str, name: str, changed: bytes, *commands: tuple[str, ...]) -> Case:
    return Case(kind, "checkpoint", {f"in/model/{name}": changed}, commands)


@st.composite
def weights(draw: Draw, originals: Originals) -> Case:
    """A safetensors header that lies, in a file of a few tensors; or an index."""
    header = {
        "__metadata__": {"format": "pt"},
        "model.a.weight": {"dtype": "BF16", "shape": [4, 8], "data_offsets": [0, 64]},
        "model.b.weight": {"dtype": "F32", "shape": [4], "data_offsets": [64, 80]},
    }
    text = draw(json_file(to_bytes(header)))
    length = draw(st.sampled_from((len(text), len(text), len(text), *NUMBERS))) % 2**64
    data = struct.pack("<Q", length) + text + bytes(draw(st.sampled_from((0, 79, 80, 80, 80, 81))))
    commands = (INSPECT, RUN)
    if draw(st.integers(0, 2)):
        return _of_checkpoint("weights", "model.safetensors", data, *commands)
    index = {"metadata": {"total_size": 80}, "weight_map": {"model.a.weight": "a.safetensors"}}
    files = {
        "in/model/model.safetensors.index.json": draw(json_file(to_bytes(index))),
        "in/model/a.safetensors": data,
    }
    return Case("weights", "checkpoint", files, commands)


@st.composite
def tokenizers(draw: Draw, originals: Originals) -> Case:
    names = ("tokenizer.json", "tokenizer.json", "tokenizer_config.json", "added_tokens.json")
    name = draw(st.sampled_from((*names, "special_tokens_map.json")))
    data = originals.files.get(f"checkpoint/{name}", b'{"<|x|>": 7, "bos_token": "<|y|>"}')
    return _of_checkpoint("tokenizers", name, draw(json_file(data)), PROCESSOR, PLAN)


TEMPLATES = (
    "{{ messages }}", "{% for m in messages %}{{ m }}{% endfor %}", "{{ raise_exception('x') }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ 'x' * 10**10 }}", "{{ 9**9**9**9 }}",
    "{% for i in range(10**12) %}{% endfor %}", "{{ cycler.__init__.__globals__.os.system('x') }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{{ messages|tojson(indent=10**9) }}",
    "{{ '%1000000000d' % 1 }}", "{{ lipsum(n=10**7) }}", "{{ '{:>9999999999}'.format(1) }}",
    "{% set x = ['a' * 1000] %}{% for i in range(9**7) %}{% set x = x + x %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{{ range(10**9)|list }}", "{{ messages|batch(0)|list }}", "{{ ('a'*10**6)|center(10**9) }}",
    "{% include '/etc/passwd' %}", "{% extends 'x' %}", "{{ strftime_now('%Y' * 10**7) }}",
    "{{ '<|image_pad|>' * 10**6 }}", "{{ undefined.x }}", "{{ 1/0 }}", "{{ (1,)*10**9 }}",
)  # fmt: skip


@st.composite
def templates(draw: Draw, originals: Originals) -> Case:
    """A chat template changed as text, with a hostile expression, or in a JSON file."""
    original = originals.files["checkpoint/chat_template.jinja"].decode()
    how = draw(st.sampled_from(("bytes", "expression", "alone", "json")))
    expression = draw(st.sampled_from((*TEMPLATES, *TEXTS)))
    name = "chat_template.jinja"
    if how == "bytes":
        changed = draw(text_file(original.encode()))
    elif how == "json":
        name = "chat_template.json"
        changed = draw(json_file(to_bytes({"chat_template": original})))
    else:
        place = draw(st.integers(0, len(original))) if how == "expression" else 0
        rest = original[place:] if how == "expression" or draw(st.booleans()) else ""
        changed = (original[:place] + expression + rest).encode("utf-8", "surrogatepass")
    case = _of_checkpoint("templates", name, changed, PROCESSOR)
    if draw(st.integers(0, 3)) or name.endswith(".json"):
        return case
    manifest = json.loads(originals.files["fp32/lvr.json"])
    manifest["chat_template"] = changed.decode("utf-8", "replace")
    return Case("templates", "fp32", {"in/model/lvr.json": to_bytes(manifest)}, (RUN,))


@st.composite
def configs(draw: Draw, originals: Originals) -> Case:
    name = draw(st.sampled_from(("config.json", "config.json", "generation_config.json")))
    changed = draw(json_file(originals.files[f"checkpoint/{name}"]))
    commands: Commands = (INSPECT, PROCESSOR, PLAN)
    if draw(st.integers(0, 5)) == 0:
        commands = (*commands, RUN)
    return _of_checkpoint("configs", name, changed, *commands)


@st.composite
def preprocessors(draw: Draw, originals: Originals) -> Case:
    data = originals.files["checkpoint/preprocessor_config.json"]
    name = "preprocessor_config.json"
    if draw(st.integers(0, 3)) == 0:
        name = "processor_config.json"
        data = to_bytes({"image_processor": json.loads(data), "chat_template": "{{ messages }}"})
    return _of_checkpoint("preprocessors", name, draw(json_file(data)), PROCESSOR, PLAN)


@st.composite
def adapters(draw: Draw, originals: Originals) -> Case:
    """The files of a tuned checkpoint."""
    names = ("lvr_config.json", "lvr_config.json", "adapter_config.json", "settings.yaml")
    name = draw(st.sampled_from((*names, "adapter_model.safetensors")))
    data = originals.files[f"tuned/{name}"]
    if name.endswith(".json"):
        changed = draw(json_file(data))
    elif name.endswith(".yaml"):
        changed = draw(text_file(data))
    else:
        changed = draw(changed_bytes(data, near=draw(st.sampled_from((None, 16, 4000)))))
    commands = (INSPECT, PROCESSOR) if name.endswith(".yaml") else (INSPECT, PROCESSOR, RUN)
    return Case("adapters", "tuned", {f"in/model/{name}": changed}, commands)


# ------------------------------------------------------------------------------- answers and texts


@st.composite
def answers(draw: Draw, originals: Originals) -> Case:
    """A file of answers that a run goes on from."""
    changed = draw(json_lines_file(originals.files["answers.jsonl"]))
    ask = ("eval", "IN/model", "--suite", "IN/scenes/test.jsonl", "--limit", "2")
    return Case(
        "answers",
        "fp32",
        {"out/answers.jsonl": changed},
        ((*ask, "--answers", "OUT/answers.jsonl"),),
    )


@st.composite
def reports(draw: Draw, originals: Originals) -> Case:
    """A file that `eval --json` or `bench --json` wrote, read again."""
    if draw(st.booleans()):
        ask = ("eval", "IN/model", "--suite", "IN/scenes/test.jsonl", "--limit", "1")
        files = {"in/r.json": draw(json_file(originals.files["eval.json"]))}
        return Case("reports", "fp32", files, ((*ask, "--against", "IN/r.json"),))
    bench = originals.files["bench.json"]
    files = {"in/a.json": bench, "in/b.json": draw(json_file(bench))}
    commands = (("bench", "compare", "IN/a.json", "IN/b.json"), ("bench", "table", "IN/b.json"))
    return Case("reports", None, files, commands)


RECIPE = {
    "max_pixels": 401408,
    "lora": {"rank": 16, "alpha": 32, "dropout": 0.05, "vision": False},
    "latent": {"steps": 8, "feedback": "identity", "mode": "open"},
    "train": {"steps": 10, "batch": 1, "lr": 1e-4, "precision": "auto", "optimizer": "adamw_torch"},
    "data": {"count": 10, "eval_count": 2, "replay": None},
    "grpo": {"group": 8, "rewards": "accuracy=1"},
}


@st.composite
def recipes(draw: Draw, originals: Originals) -> Case:
    """A recipe changed as a value (JSON is YAML) or as text. Rewards of modules are code that is
    meant to run, so none is named.
    """
    import yaml

    text = yaml.safe_dump(RECIPE).encode()
    changed = draw(
        st.one_of(text_file(text), changed_json(RECIPE).map(to_bytes), changed_bytes(text))
    )
    files = {"in/recipe.yaml": changed}
    value = draw(st.one_of(st.sampled_from(TEXTS), values.map(str)))
    names = ("train.lr", "lora.rank", "latent.steps", "max_pixels", "grpo.rewards", "x")
    setting = f"{draw(st.sampled_from(names))}={value}"
    plan = ("finetune", "--model", "tiny", "--plan")
    commands = ((*plan, "--config", "IN/recipe.yaml"), (*plan, "--set", setting[:300]))
    return Case("recipes", None, files, commands)


EXPRESSION = st.recursive(
    st.one_of(
        st.sampled_from(("x", "y", "2", "0.5", "1/3", "pi", "e", "I", "oo", "zoo", "nan", "(")),
        st.integers(-(10**40), 10**40).map(str),
        st.sampled_from(TEXTS),
    ),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from("+-*/^ =,!%"), inner).map("".join),
        inner.map(lambda text: f"({text})"),
        st.tuples(
            st.sampled_from(("sqrt", "factorial", "exec", "eval", "chr", "sin", "\\frac", "gamma")),
            inner,
        ).map(lambda pair: f"{pair[0]}({pair[1]})"),
        st.tuples(
            inner, st.sampled_from(("^9^9^9^9", "!", "!!!!!", "**99999999", "e99999999"))
        ).map("".join),
    ),
    max_leaves=12,
)
ATTACKS = (
    "exec(chr(112)+chr(114))", "().__class__.__bases__[0]", "open('/etc/passwd').read()",
    "9^9^9^9", "factorial(99999999)", "2^(10^10)", "1e999999999-1e999999998", "(" * 100 + "x",
    "x" * 199, "+".join("x" * 100), "x^" * 60 + "x", "integrate(x^x,x)", "lambda:1", "a=1;b",
    "[1]*10^10", "0^-1", "1/0", "((1/3)^99)^99", "1" * 200, "-" * 199 + "1", "1,000,000.5e3",
    "f'{open}'", "√2", "½", "x²", "∞", "<answer>2</answer>", "\\boxed{2}", "$2$", "2 %",
)  # fmt: skip


@st.composite
def rewards(draw: Draw, originals: Originals) -> Case:
    """A model's answer and a sample's, as every named reward sees them."""
    texts = st.one_of(EXPRESSION, st.sampled_from(ATTACKS), st.text(max_size=60))
    expected = draw(texts)
    said = draw(st.one_of(texts, st.just(expected)))
    content = {
        "expected": expected,
        "text": said,
        "choices": draw(st.sampled_from((None, [expected]))),
    }
    return Case(
        "rewards", None, {"in/answer.json": to_bytes(content)}, (("reward", "IN/answer.json"),)
    )


Kind = Callable[[Originals], "st.SearchStrategy[Case]"]
KINDS: dict[str, Kind] = {
    "pictures": pictures,
    "foreign pictures": foreign_pictures,
    "samples": samples,
    "coco": coco,
    "yolo": yolo,
    "labelstudio": labelstudio,
    "lvr": lvr,
    "viscot": viscot,
    "benchmarks": benchmarks,
    "manifests": manifests,
    "graphs": graphs,
    "external data": external_data,
    "weights": weights,
    "tokenizers": tokenizers,
    "templates": templates,
    "configs": configs,
    "preprocessors": preprocessors,
    "adapters": adapters,
    "answers": answers,
    "reports": reports,
    "recipes": recipes,
    "rewards": rewards,
}
