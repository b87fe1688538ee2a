"""Our text encoders and VAE against ComfyUI's own, on the same files and inputs."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfyui_checkout
import pytest
import torch
from flux_files import map_file
from ranks.components.component_files import (
    DTYPES,
    T5,
    Clip,
    SmallVae,
    Tensors,
    copies,
    random_weights,
    specs_of,
    store,
)
from safetensors.torch import load_file, save_file
from xdit_sidecar.daemon.models.text_encoder_config import ClipConfig, T5Config
from xdit_sidecar.daemon.models.text_encoder_detection import (
    detect_clip,
    detect_t5,
    detect_text_encoder_file,
)
from xdit_sidecar.daemon.models.vae_detection import detect_vae, detect_vae_file
from xdit_sidecar.daemon.ranks.text_encoders.clip import build_clip
from xdit_sidecar.daemon.ranks.text_encoders.t5 import build_t5
from xdit_sidecar.daemon.ranks.vae.model import build_vae
from xdit_sidecar.daemon.ranks.vae.tiles import decode_in_tiles
from xdit_sidecar.protocol.safetensors_file import SafetensorsFile

PROGRAM = Path(__file__).with_name("comfy_components.py")
TILE, OVERLAP = 8, 2
END = 49407


@dataclass(frozen=True)
class Case:
    """One file and what is done with it."""

    model: Clip | T5 | SmallVae
    dtype: str = "F32"
    scaled: bool = False
    compute: torch.dtype = torch.float32


CASES = {
    "clip": Case(Clip()),
    "clip, one head of 96": Case(Clip(width=96, layers=1)),
    "clip in fp16": Case(Clip(), "F16"),
    "clip in bf16": Case(Clip(), "BF16"),
    "clip in fp8": Case(Clip(), "F8_E4M3"),
    "clip in scaled fp8": Case(Clip(layers=1), scaled=True),
    "t5": Case(T5()),
    "t5 in fp16": Case(T5(), "F16"),
    "t5 in bf16": Case(T5(), "BF16"),
    "t5 in fp8": Case(T5(), "F8_E4M3"),
    "t5 in scaled fp8": Case(T5(), scaled=True),
    "vae": Case(SmallVae()),
    "vae, 3 levels": Case(SmallVae(multipliers=(1, 2, 3), blocks=2)),
    "vae in bf16": Case(SmallVae(), "BF16"),
    "vae in fp16": Case(SmallVae(), "F16"),
    "vae, computed in bf16": Case(SmallVae(), compute=torch.bfloat16),
}
COMPUTED_IN_BF16 = [name for name, case in CASES.items() if case.compute != torch.float32]


def inputs_for(model: Clip | T5 | SmallVae, compute: torch.dtype = torch.float32) -> Tensors:
    generator = torch.Generator().manual_seed(5)
    if isinstance(model, Clip):
        tokens = torch.randint(0, END, (3, model.positions), generator=generator)
        tokens[0, 9:] = END
        tokens[1, 4] = END  # padded with something else, and one text without an end
        return {"tokens": tokens}
    if isinstance(model, T5):
        tokens = torch.randint(2, model.vocabulary, (2, 150), generator=generator)
        tokens[0, 7:] = 0
        tokens[0, 6] = 1
        return {"tokens": tokens}
    # Sides that 8 does not divide, and neither does 4. A CPU takes long for convolutions in bf16.
    rows, (height, width) = (2, (11, 13)) if compute == torch.float32 else (1, (5, 6))
    latent = torch.randn((rows, 16, height, width), generator=generator) * 2
    image = torch.rand((rows, 4 * height - 1, 4 * width - 2, 3), generator=generator)
    return {"latent": latent, "image": image}


def comfyui_sizes(model: Clip | T5 | SmallVae, path: Path) -> dict[str, Any]:
    """Of the same model in ComfyUI, from what is detected: what is detected wrongly differs."""
    if isinstance(model, SmallVae):
        return {
            "ch": model.channels,
            "ch_mult": model.multipliers,
            "num_res_blocks": model.blocks,
            "z_channels": model.latent,
        }
    with SafetensorsFile.open(path) as file:
        config = detect_text_encoder_file(file)
    if isinstance(config, ClipConfig):
        return {
            "num_hidden_layers": config.layers,
            "hidden_size": config.width,
            "num_attention_heads": config.heads,
            "intermediate_size": config.mlp_size,
            "hidden_act": "quick_gelu",
            "max_position_embeddings": config.positions,
            "eos_token_id": config.end_token,
        }
    return {
        "num_layers": config.layers,
        "d_model": config.width,
        "d_kv": config.head_size,
        "num_heads": config.heads,
        "d_ff": config.mlp_size,
        "dense_act_fn": "gelu_pytorch_tanh",
        "is_gated_act": True,
        "model_type": "t5",
        "vocab_size": config.vocabulary,
    }


def run_ours(case: Case, path: Path, inputs: Tensors) -> Tensors:
    tensors, _ = map_file(path)
    with SafetensorsFile.open(path) as file:
        if isinstance(case.model, SmallVae):
            vae = build_vae(detect_vae_file(file), tensors, case.compute)
            model = vae.model
            tiled = [
                decode_in_tiles(
                    one[None].to(case.compute),
                    vae.decode_one,
                    vae.config.ratio,
                    tile=TILE,
                    overlap=OVERLAP,
                )
                for one in inputs["latent"]
            ]
            output = {
                "image": vae.decode(inputs["latent"]),
                "tiled": ((torch.cat(tiled) + 1) / 2).clamp(0, 1).movedim(1, 3),
                "latent": vae.encode(inputs["image"]),
            }
            cast_layers = vae.cast_layers
        else:
            config = detect_text_encoder_file(file)
            if isinstance(config, T5Config):
                t5 = build_t5(config, tensors)
                output = {"hidden": t5.encode(inputs["tokens"])}
                model, cast_layers = t5.model, t5.cast_layers
            else:
                clip = build_clip(config, tensors)
                output = dict(clip.encode(inputs["tokens"])._asdict())
                model, cast_layers = clip.model, clip.cast_layers
    assert (cast_layers > 0) == (DTYPES[case.dtype] != case.compute or case.scaled)
    assert not copies(model.parameters(), tensors.values())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    return output


Outputs = dict[str, tuple[Tensors, Tensors]]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Outputs:
    """Case → (ours, ComfyUI's); one process of ComfyUI answers them all."""
    comfyui = comfyui_checkout.comfyui()
    folder = tmp_path_factory.mktemp("components")
    jobs, ours = [], {}
    with torch.no_grad():
        for number, (name, case) in enumerate(CASES.items()):
            weights, given, out = (
                folder / f"{number}-{kind}.safetensors" for kind in ("weights", "inputs", "output")
            )
            random = random_weights(case.model.shapes(), number)
            save_file(store(random, case.dtype, scaled=case.scaled), weights)
            inputs = inputs_for(case.model, case.compute)
            save_file(inputs, given)
            ours[name] = run_ours(case, weights, inputs)
            stored = torch.bfloat16 if case.scaled else DTYPES[case.dtype]
            dtype = case.compute if isinstance(case.model, SmallVae) else stored
            jobs.append(
                {
                    "kind": {Clip: "clip", T5: "t5", SmallVae: "vae"}[type(case.model)],
                    "weights": str(weights),
                    "inputs": str(given),
                    "output": str(out),
                    "sizes": comfyui_sizes(case.model, weights),
                    "dtype": str(dtype).removeprefix("torch."),
                    "tile": TILE,
                    "overlap": OVERLAP,
                }
            )
    (folder / "jobs.json").write_text(json.dumps(jobs))
    done = subprocess.run(
        [sys.executable, "-B", str(PROGRAM), str(comfyui), str(folder / "jobs.json")],
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return {
        name: (ours[name], load_file(job["output"])) for name, job in zip(CASES, jobs, strict=True)
    }


@pytest.mark.parametrize("name", [name for name in CASES if name not in COMPUTED_IN_BF16])
def test_output_equals_comfyui(outputs: Outputs, name: str) -> None:
    ours, theirs = outputs[name]
    assert ours.keys() == theirs.keys()
    for part, output in ours.items():
        print(f"{name}, {part}: {(output - theirs[part]).abs().max():.1e}")
        assert output.dtype == torch.float32
        assert theirs[part].std() > 0.05
        torch.testing.assert_close(output, theirs[part], rtol=0, atol=2e-5)


def test_bf16_errs_no_more_than_comfyui(outputs: Outputs) -> None:
    ours, theirs = outputs["vae, computed in bf16"]
    number = list(CASES).index("vae, computed in bf16")
    random = random_weights(SmallVae().shapes(), number)
    exact = build_vae(detect_vae(specs_of(random), "exact"), random, torch.float32)
    inputs = inputs_for(SmallVae(), torch.bfloat16)
    right = {"image": exact.decode(inputs["latent"]), "latent": exact.encode(inputs["image"])}
    for part, expected in right.items():
        mine, comfyuis = (
            (output[part] - expected).square().mean().sqrt().item() for output in (ours, theirs)
        )
        assert 0 < comfyuis < 0.1 * expected.std().item()
        assert mine < 1.2 * comfyuis


@pytest.mark.parametrize("flat", [False, True])
def test_names_of_whole_checkpoints_and_of_flattened_models(flat: bool) -> None:
    clip, t5 = Clip(width=32, layers=1, vocabulary=50), T5(layers=1)
    texts = random_weights(clip.shapes())
    if flat:
        texts = {name.removeprefix("text_model."): tensor for name, tensor in texts.items()}
    texts["text_projection.weight"] = torch.zeros(32, 32)
    whole = {f"text_encoders.clip_l.transformer.{name}": t for name, t in texts.items()}
    whole |= {
        f"text_encoders.t5xxl.transformer.{n}": t for n, t in random_weights(t5.shapes()).items()
    }
    whole["text_encoders.clip_l.logit_scale"] = torch.tensor(4.6)
    for detect in (detect_clip, detect_t5):
        config = detect(specs_of(whole), "whole")
        own = {
            n.removeprefix(config.prefix): t
            for n, t in whole.items()
            if n.startswith(config.prefix)
        }
        if isinstance(config, ClipConfig):
            assert config.end_token == 49
            assert build_clip(config, own).encode(torch.zeros(1, 77).long()).pooled.shape == (1, 32)
        else:
            assert build_t5(config, own).encode(torch.zeros(1, 9).long()).shape == (1, 9, 48)
