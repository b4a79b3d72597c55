"""The paper's tables and figures, drawn from runs of main.py."""
