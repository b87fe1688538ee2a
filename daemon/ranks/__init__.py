"""Rank processes: the only part of the daemon that imports torch."""
