"""What ComfyUI's own FLUX.1 tokenizer makes of prompts, in a process of its own.

``python comfy_tokens.py COMFYUI PROMPTS``: PROMPTS is a JSON list of texts. Prints a JSON list of
[rows of CLIP-L ids, ids of T5], with ComfyUI's syntax of weights switched off.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(comfyui: str, prompts: str) -> None:
    sys.path.insert(0, comfyui)
    sys.argv[1:] = []
    import comfy.cli_args

    comfy.cli_args.args.cpu = True  # before model_management looks for a GPU
    from comfy.text_encoders.flux import FluxTokenizer

    tokenizer = FluxTokenizer()
    answers = []
    for text in json.loads(Path(prompts).read_text()):
        found = tokenizer.tokenize_with_weights(text, disable_weights=True)
        rows = [[token for token, _ in row] for row in found["l"]]
        (t5,) = [[token for token, _ in row] for row in found["t5xxl"]]
        answers.append([rows, t5])
    print(json.dumps(answers))


if __name__ == "__main__":
    main(*sys.argv[1:])
