"""Plots where matplotlib is installed, and a word where it is not."""

from pathlib import Path
from types import ModuleType


def pyplot_for(path: Path) -> ModuleType | None:
    """
    Returns matplotlib's pyplot with a backend that needs no display, or None.

    Args:
        path: The plot that will not be there without matplotlib, for the line that says so.
    """
    try:
        import matplotlib
    except ImportError:
        print(f"no {path.name}: matplotlib is missing; pip install matplotlib", flush=True)
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
