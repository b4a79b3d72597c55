"""The installed timm, with the modules of this directory laid over it.

What differs from the installed release:

- `models/vision_transformer.py`: models take `quant=Recipe`, and `deit_micro_patch4_32` is new.
- `models/swin_transformer.py`: models take `quant=Recipe`.
- `models/_quant.py`, what these two share, is new.

`_overlay.py` says how it works.
"""

from ._overlay import run_installed

run_installed(globals())
