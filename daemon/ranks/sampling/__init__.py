"""FLUX.1's denoising loop in a rank, with the numbers of ComfyUI's KSampler."""
