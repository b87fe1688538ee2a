"""A ComfyUI's folder on this disk, and the node pack in it: for the command line alone."""
