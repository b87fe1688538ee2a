"""Attacks on a real daemon, each used by ``make test`` with a fiftieth of its count in the soak."""
