"""FLUX.1's text encoders in a rank: transformers' models around weights in a shared region."""
