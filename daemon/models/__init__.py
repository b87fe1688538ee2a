"""What a weights file is, from its header alone: no torch, no weight read."""
