"""The `quant=Recipe` argument, which all models of this directory take."""

from __future__ import annotations

from quantization import Int4Recipe, Recipe, swap_linears


class TakesQuant:
    """Goes before an installed model class; `quant` swaps the linears that `quantization/families/` has for the class.

    Raises ValueError if there are none.
    """

    quant_names: tuple[str, ...] | None = None
    """Endings of the names of other linears to swap, for all models of the class."""

    def __init__(self, *args, quant: Recipe | Int4Recipe | None = None, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        if quant is not None:
            swap_linears(self, quant)
