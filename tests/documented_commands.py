"""What a test does with each command of the documents. One that is not in here fails the test."""

from __future__ import annotations

from typing import NamedTuple


class Run(NamedTuple):
    """It is run, against one daemon on the CPU, and ends so."""

    code: int = 0


class NotRun(NamedTuple):
    """Its words are checked as far as they can be; it is not run, for this reason."""

    reason: str


BY_FIXTURE = NotRun("the daemon that the others are run against was started so")
CHANGES_HOST = NotRun("changes this machine; what it writes is in tests/service")
NEEDS_NETWORK = NotRun("needs a package index; the wheel is built by tests/test_house_rules.py")

COMMANDS: dict[str, Run | NotRun] = {
    # the readme
    "xdit-sidecar serve": BY_FIXTURE,
    "xdit-sidecar node install ~/ComfyUI --with-requirements": Run(),
    "xdit-sidecar load tiny-transformer.safetensors": Run(),
    "xdit-sidecar load tiny-clip_l.safetensors": Run(),
    "xdit-sidecar load tiny-t5.safetensors": Run(),
    "xdit-sidecar load tiny-vae.safetensors": Run(),
    "xdit-sidecar load model.gguf": Run(1),
    'xdit-sidecar generate --prompt "a red fox in deep snow" --out fox.png --size 256x256 '
    "--steps 4 --seed 7 --tokenizers ~/ComfyUI": Run(),
    "xdit-sidecar unload t5 tiny-vae.safetensors": Run(),
    "xdit-sidecar plan flux1-dev.safetensors --gpus 2 --memory 24GiB": Run(1),
    "python3 -m venv ~/xdit-sidecar": NEEDS_NETWORK,
    "pip install '.[daemon]'": NEEDS_NETWORK,
    # operations
    "xdit-sidecar service install": Run(),
    "xdit-sidecar service install --system": CHANGES_HOST,
    "xdit-sidecar config --example": Run(),
    "XDIT_SIDECAR_RANKS=many xdit-sidecar serve": Run(2),
    "python3 -m venv /opt/xdit-sidecar": CHANGES_HOST,
    # the model that draws digits
    "xdit-sidecar serve --device cpu": BY_FIXTURE,
    "xdit-sidecar load models/diffusion_models/digits-flux.safetensors": Run(),
    "xdit-sidecar load models/vae/digits-ae.safetensors": Run(),
    "xdit-sidecar load models/text_encoders/digits-clip_l.safetensors": Run(),
    "xdit-sidecar load models/text_encoders/digits-t5xxl.safetensors": Run(),
    'xdit-sidecar generate --prompt "a handwritten seven" --out seven.png --size 64x64 --steps 8 '
    "--seed 7 --tokenizers models/tokenizers": Run(),
    # containers
    "xdit-sidecar node install ./ComfyUI": Run(),
    "xdit-sidecar ipc health-check": Run(),
}

#: Programs of others.
PROGRAMS: dict[str, NotRun] = {
    "make": NotRun("its targets are run by people and CI; that they exist is checked"),
    "mkdir": NotRun("makes folders that the test has; those for containers are made in their test"),
    "python": NotRun("trains for a quarter of an hour; `make soak` does it, in digits-again"),
    "systemctl": CHANGES_HOST,
    "systemd-sysusers": CHANGES_HOST,
    "systemd-tmpfiles": CHANGES_HOST,
    "loginctl": CHANGES_HOST,
    "journalctl": NotRun("needs a journal; tests/service/test_log.py has the lines"),
    "sudoedit": NotRun("waits for a person"),
    "docker": NotRun("needs Docker; its parts are in tests/docs/test_container_parts.py"),
}
