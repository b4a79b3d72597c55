"""The `quant=Recipe` argument, which all models of this directory take."""

from __future__ import annotations

from quantization import BLOCK_LINEARS, Int4Recipe, Recipe, swap_linears


class TakesQuant:
    """Goes before an installed model class; `quant` swaps the linears whose names end in one of `quant_names`.

    Raises ValueError if there are none.
    """

    quant_names: tuple[str, ...] = BLOCK_LINEARS

    def __init__(self, *args, quant: Recipe | Int4Recipe | None = None, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        if quant is not None:
            swap_linears(self, quant, self.quant_names)
