"""A CUDA driver without a GPU, for tests."""
