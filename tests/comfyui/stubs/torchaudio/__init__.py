"""Stands in for torchaudio: ComfyUI imports it for models and nodes that no test uses.

The wheels at the usual index do not load beside a CPU build of torch.
"""
