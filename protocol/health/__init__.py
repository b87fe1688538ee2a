"""The health-check as a library: it proves the path between this process and the daemon.

Imports neither torch nor anything of the command line, so that it runs inside ComfyUI, too.
"""
