"""Only there to be imported."""


class MelScale:
    """A name that ComfyUI imports."""
