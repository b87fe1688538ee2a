"""The long runs: the same code as the tests, with the full counts."""
