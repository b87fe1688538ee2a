"""FLUX.1 in a rank: diffusers' model around weights that lie in a shared region."""
