"""xdit-sidecar: xDiT models that stay on the GPUs while ComfyUI comes and goes.

Importing this package needs nothing but the standard library: no torch, no GPU, no daemon.
"""

__version__ = "0.1.0"

__all__ = ["__version__"]
