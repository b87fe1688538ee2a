"""Only there to be imported."""
