"""llama.cpp's own converter, which knows the tokenizers of published models by a hash, told of one
more: what its convert_hf_to_gguf_update.py would write into it for the embedded model.

    python converter.py LLAMA_CPP FOLDER --outtype f32 --outfile FILE [--mmproj]

The embedded model's tokenizer cuts words as GPT-2's does.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    source = Path(sys.argv[1])
    sys.path.insert(0, str(source))
    sys.path.insert(1, str(source / "gguf-py"))
    from conversion import base

    known = base.TextModel.get_vocab_base_pre

    def with_one_more(self: Any, tokenizer: Any) -> str:
        try:
            return str(known(self, tokenizer))
        except NotImplementedError:
            return "gpt-2"

    base.TextModel.get_vocab_base_pre = with_one_more
    script = source / "convert_hf_to_gguf.py"
    sys.argv = [str(script), *sys.argv[2:]]
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
