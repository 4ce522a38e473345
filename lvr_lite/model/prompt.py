"""From messages to token ids: the one place where a prompt is made. May import: jinja2, tokenizers,
numpy.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from lvr_lite.errors import LvrError


@lru_cache(maxsize=8)
def _compiled(template: str) -> Any:
    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(template)


def render(template: str, question: str, images: int) -> str:
    """The chat template filled with one user turn of `images` pictures and a question, ending where
    the answer begins.
    """
    content: list[dict[str, str]] = [{"type": "image"}] * images + [
        {"type": "text", "text": question}
    ]
    try:
        return str(
            _compiled(template).render(
                messages=[{"role": "user", "content": content}], add_generation_prompt=True
            )
        )
    except TemplateError as error:
        raise LvrError(f"the chat template cannot be rendered: {error}") from error


def prompt_ids(
    tokenizer: Tokenizer, template: str, question: str, image_token: str, pictures: list[str]
) -> list[int]:
    """Token ids of a prompt in which `pictures[i]` stands for picture i (a family's
    `picture_text`).

    Raises LvrError where the question itself contains the image token.
    """
    if image_token in question:
        raise LvrError(
            f"the question contains {image_token}, which stands for a picture: leave it out"
        )
    parts = render(template, question, len(pictures)).split(image_token)
    text = parts[0] + "".join(
        picture + part for picture, part in zip(pictures, parts[1:], strict=True)
    )
    return list(tokenizer.encode(text, add_special_tokens=False).ids)
