"""From messages to token ids: the one place where a prompt is made. May import: jinja2, tokenizers,
numpy.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from tokenizers import Tokenizer

from lvr_lite.errors import LvrError
from lvr_lite.model.template_limits import LimitedEnvironment, limited

Message = dict[str, object]


class GenerationBlock(Extension):
    """`{% generation %} … {% endgeneration %}`: marks what a model said, for training elsewhere;
    its body is rendered as it is.
    """

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().astimezone().strftime(form)


def _to_json(value: object, **options: Any) -> str:
    """jinja's own filter escapes HTML."""
    return json.dumps(value, **{"ensure_ascii": False} | options)


@lru_cache(maxsize=8)
def _compiled(template: str) -> Any:
    environment = LimitedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[GenerationBlock, "jinja2.ext.loopcontrols"],
    )
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.add_filter("tojson", _to_json)
    return environment.from_string(template)


def render(template: str, question: str, images: int, answer: str | None = None) -> str:
    """The chat template filled with one user turn of `images` pictures and a question.

    answer: the model's turn that follows; without one the text ends where it would begin.

    Templates see what transformers gives them (utils/chat_template_utils.py): break and continue,
    `generation` blocks, tojson, strftime_now, raise_exception.

    Raises LvrError where the template fails, whatever it raises, and where it takes more steps or
    characters than a prompt can need (`lvr_lite.model.template_limits`).
    """
    content: list[Message] = [{"type": "image"}] * images
    content.append({"type": "text", "text": question})
    messages: list[Message] = [{"role": "user", "content": content}]
    if answer is not None:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    try:
        with limited():
            rendered = _compiled(template).render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=answer is None,
            )
    # A template is a program of somebody else and may raise anything.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise LvrError(f"the chat template cannot be rendered: {reason}") from error
    return str(rendered)


def answer_prefix(template: str) -> str:
    """What stands between the prompt and the first word of the model's turn: a space in SmolVLM,
    nothing in Qwen-VL.
    """
    word = "ANSWER"
    prompt = render(template, "x", 0)
    try:
        whole = render(template, "x", 0, word)
    except LvrError:
        # A template may know user turns alone.
        return ""
    between = whole[len(prompt) :].partition(word)[0]
    return between if whole.startswith(prompt) and not between.strip() else ""


def prompt_ids(
    tokenizer: Tokenizer,
    template: str,
    question: str,
    image_token: str,
    pictures: list[str],
    special: Iterable[str] = (),
) -> list[int]:
    """Token ids of a prompt in which `pictures[i]` stands for picture i (a family's
    `picture_text`).

    special: the model's control tokens.

    Raises LvrError where the question itself contains one, or the template leaves pictures out.
    """
    if image_token in question:
        raise LvrError(
            f"the question contains {image_token}, which stands for a picture: leave it out"
        )
    for token in special:
        if token in question:
            raise LvrError(
                f"the question contains {token}, a control token of this model: leave it out"
            )
    parts = render(template, question, len(pictures)).split(image_token)
    if len(parts) != len(pictures) + 1:
        raise LvrError(
            f"the chat template shows {len(parts) - 1} of {len(pictures)} pictures; "
            "copy the template of the vision-language model (chat_template.jinja)"
        )
    text = parts[0]
    for picture, part in zip(pictures, parts[1:], strict=True):
        text += picture + part
    return list(tokenizer.encode(text, add_special_tokens=False).ids)
