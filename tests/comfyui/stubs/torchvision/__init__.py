"""Stands in for torchvision: ComfyUI imports it for models that no test loads.

The wheels at the usual index do not load beside a CPU build of torch.
"""
