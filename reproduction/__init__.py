"""The paper's tables and figures: `python -m reproduction TARGET` trains what one needs and reports it.

`targets.py` says what the paper reports, `protocols.py` on what to train, `runs.py` which runs that makes, `runner.py`
runs them, `report.py` puts the paper's numbers and ours side by side, `figures.py` draws.
"""
