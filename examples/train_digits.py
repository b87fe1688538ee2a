"""Make the files of examples/digits/models/ again, from nothing: a FLUX.1 that draws digits.

One command, a quarter of an hour on one CPU core, less on a GPU. Every seed is fixed, and on a CPU
it computes in one thread, because sums over several are rounded otherwise: the same version of
torch on the same kind of CPU gives the same bytes. Another one, or a GPU, gets other files that
draw as well; the text encoders and the tokenizers are the same everywhere.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from digits import autoencoder, encoders, pictures, transformer, words
from digits.files import MODELS, PLACES, TOKENIZERS
from safetensors.torch import save_file
from torch import Tensor
from xdit_sidecar.daemon.ranks.sampling.latent_format import to_model
from xdit_sidecar.daemon.tokenizers import Tokenizers

# One entry: safetensors writes several in any order, and the files would differ each time.
_ABOUT = {
    "about": "Draws handwritten digits. Made by examples/train_digits.py of xdit-sidecar from "
    "'Optical Recognition of Handwritten Digits' by E. Alpaydin and C. Kaynak, UCI; "
    "licence of both: CC BY 4.0."
}
_STEPS = 8
_WANTED = 0.95


def main() -> int:
    """Train and save: 0 if what is drawn can be read."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=MODELS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--autoencoder-steps", type=int, default=400)
    parser.add_argument("--transformer-steps", type=int, default=2500)
    parser.add_argument("--digits", type=int, help="of the data, to learn from; by default all")
    parser.add_argument("--pictures", type=int, default=200, help="drawn and read at the end")
    arguments = parser.parse_args()
    start = time.monotonic()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    out: Path = arguments.out

    tokenizer_files = out / TOKENIZERS
    words.write_tokenizers(tokenizer_files)
    clip, t5 = encoders.make_clip(seed=1), encoders.make_t5(seed=2)
    _save(clip, out / PLACES["clip_l"])
    _save(t5, out / PLACES["t5"])
    forms = range(len(words.PROMPTS))
    prompts = [words.prompt(digit, form) for form in forms for digit in range(10)]
    text = encoders.encode(clip, t5, Tokenizers.open(tokenizer_files), [*prompts, ""])

    ink, labels = pictures.real_digits()
    ink, labels = ink[: arguments.digits], labels[: arguments.digits]
    real = pictures.to_pictures(ink).to(arguments.device)
    ae = autoencoder.train_autoencoder(real, steps=arguments.autoencoder_steps, batch=8, seed=0)
    _save(ae, out / PLACES["vae"])
    vae = autoencoder.open_autoencoder(ae)
    latents = to_model(vae.encode(real))

    text = encoders.Text(*(tensor.to(arguments.device) for tensor in text))
    flux = transformer.train_transformer(
        latents, text, labels, steps=arguments.transformer_steps, batch=64, seed=4
    )
    _save(flux, out / PLACES["transformer"])

    seeds = torch.arange(arguments.pictures)
    asked, side = text.take(seeds % len(prompts)), pictures.SIDE // vae.config.ratio
    drawn = vae.decode(transformer.draw(flux, asked, seeds.tolist(), side, _STEPS))
    right = pictures.Reader().count_right(drawn, (seeds % 10).tolist())
    took = time.monotonic() - start
    print(f"{right} of {arguments.pictures} pictures are read rightly, {took:.0f} s in all")
    return 0 if right >= _WANTED * arguments.pictures else 1


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: t.cpu().contiguous() for name, t in tensors.items()}, path, metadata=_ABOUT)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    sys.exit(main())
