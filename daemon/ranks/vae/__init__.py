"""FLUX.1's VAE in a rank: diffusers' model around weights that lie in a shared region."""
