"""Greedy answers of llama.cpp from a GGUF and its mmproj, through llama-cpp-python's bindings of
libmtmd. Everything in float32 but what the files hold: K/V too, and no flash attention.

    python llama.py MODEL.gguf MMPROJ.gguf QUESTIONS.json ANSWERS.json TOKENS

A question's "prompt" is the template filled, `<__media__>` in the place of a picture; "never" and
"ends" are ids.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp import mtmd_cpp as mtmd
from PIL import Image

F32 = 0
NO_FLASH_ATTENTION = 0
TEXT_CHUNK = 0
ROOM = 2048


class Reader:
    def __init__(self, model: str, mmproj: str) -> None:
        self.llama = llama_cpp.Llama(
            model,
            n_ctx=ROOM,
            n_batch=ROOM,
            n_ubatch=ROOM,
            n_threads=1,
            n_threads_batch=1,
            type_k=F32,
            type_v=F32,
            flash_attn=False,
            verbose=False,
        )
        self.context = self.llama._ctx.ctx
        params = mtmd.mtmd_context_params_default()
        params.use_gpu = False
        params.n_threads = 1
        params.warmup = False
        params.flash_attn_type = NO_FLASH_ATTENTION
        self.vision = mtmd.mtmd_init_from_file(mmproj.encode(), self.llama._model.model, params)
        if self.vision is None:
            raise SystemExit(f"{mmproj}: cannot be loaded")
        self.vocabulary = self.llama.n_vocab()

    def answer(self, question: dict[str, Any], tokens: int) -> dict[str, list[int]]:
        picture = Image.open(question["picture"]).convert("RGB")
        pixels = picture.tobytes()
        data = (ctypes.c_uint8 * len(pixels)).from_buffer_copy(pixels)
        bitmap = mtmd.mtmd_bitmap_init(picture.width, picture.height, data)
        words = question["prompt"].encode()
        text = mtmd.mtmd_input_text(words, len(words), False, True)
        chunks = mtmd.mtmd_input_chunks_init()
        bitmaps = (mtmd.mtmd_bitmap_p_ctypes * 1)(bitmap)
        if mtmd.mtmd_tokenize(self.vision, chunks, ctypes.byref(text), bitmaps, 1):
            raise SystemExit(f"{question['picture']}: cannot be tokenized")
        self.llama.reset()
        self.llama._ctx.kv_cache_clear()
        past = llama_cpp.llama_pos(0)
        if mtmd.mtmd_helper_eval_chunks(
            self.vision, self.context, chunks, 0, 0, ROOM, True, ctypes.byref(past)
        ):
            raise SystemExit(f"{question['picture']}: cannot be read")
        prompt = self._prompt(chunks)
        mtmd.mtmd_input_chunks_free(chunks)
        mtmd.mtmd_bitmap_free(bitmap)
        return {"prompt": prompt, "tokens": self._tokens(question, past.value, tokens)}

    def _prompt(self, chunks: Any) -> list[int]:
        """The ids of the prompt's text; visual tokens have none."""
        ids: list[int] = []
        for number in range(mtmd.mtmd_input_chunks_size(chunks)):
            chunk = mtmd.mtmd_input_chunks_get(chunks, number)
            if mtmd.mtmd_input_chunk_get_type(chunk) == TEXT_CHUNK:
                count = ctypes.c_size_t()
                own = mtmd.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(count))
                ids += own[: count.value]
        return ids

    def _tokens(self, question: dict[str, Any], past: int, limit: int) -> list[int]:
        chosen: list[int] = []
        batch = llama_cpp.llama_batch_init(1, 0, 1)
        while len(chosen) < limit:
            pointer = llama_cpp.llama_get_logits_ith(self.context, -1)
            logits = np.ctypeslib.as_array(pointer, shape=(self.vocabulary,)).copy()
            logits[question["never"]] = -np.inf
            token = int(logits.argmax())
            if token in question["ends"]:
                break
            chosen.append(token)
            batch.n_tokens = 1
            batch.token[0] = token
            batch.pos[0] = past
            batch.n_seq_id[0] = 1
            batch.seq_id[0][0] = 0
            batch.logits[0] = True
            if llama_cpp.llama_decode(self.context, batch):
                raise SystemExit("llama_decode failed")
            past += 1
        llama_cpp.llama_batch_free(batch)
        return chosen


def main() -> None:
    model, mmproj, questions, answers, tokens = sys.argv[1:]
    reader = Reader(model, mmproj)
    given = [
        reader.answer(q, int(tokens))
        for q in json.loads(Path(questions).read_text(encoding="utf-8"))
    ]
    report = {"version": llama_cpp.__version__, "answers": given}
    Path(answers).write_text(json.dumps(report), encoding="utf-8")


if __name__ == "__main__":
    main()
