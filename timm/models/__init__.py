"""The installed `timm.models`, with the modules of this directory laid over it."""

from timm._overlay import run_installed

run_installed(globals())
