"""Runs a notebook's code cells in order, in this process, without Jupyter; tests do it in a fresh one.

    python tests/notebook.py examples/entropy_law.ipynb [--write]

prints, as JSON, what each code cell printed; with ``--write`` it stores that and the figures in the notebook.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

DPI = 80


def executed(notebook: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """The outputs of the code cells: what they print, and their figures as PNG."""
    os.environ["MPLBACKEND"] = "Agg"
    import matplotlib.pyplot as plt

    names: dict[str, Any] = {"__name__": "__main__"}
    found: list[list[dict[str, Any]]] = []
    for i, cell in enumerate(cell for cell in notebook["cells"] if cell["cell_type"] == "code"):
        printed, outputs = io.StringIO(), []
        with contextlib.redirect_stdout(printed):
            exec(compile("".join(cell["source"]), f"<cell {i + 1}>", "exec"), names)
        if printed.getvalue():
            outputs.append({"name": "stdout", "output_type": "stream", "text": _lines(printed.getvalue())})
        for number in plt.get_fignums():
            picture = io.BytesIO()
            plt.figure(number).savefig(picture, format="png", dpi=DPI, metadata={"Software": None})
            plt.close(number)
            data = {"image/png": base64.b64encode(picture.getvalue()).decode(), "text/plain": ["<Figure>"]}
            outputs.append({"data": data, "metadata": {}, "output_type": "display_data"})
        found.append(outputs)
    return found


def _lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def printed(outputs: list[list[dict[str, Any]]]) -> list[str]:
    """What each cell printed."""
    return ["".join("".join(output.get("text", "")) for output in cell) for cell in outputs]


def main(argv: list[str]) -> None:
    """The command line."""
    path = Path(argv[0])
    notebook = json.loads(path.read_text())
    outputs = executed(notebook)
    if "--write" in argv:
        cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
        for number, (cell, own) in enumerate(zip(cells, outputs, strict=True), 1):
            cell |= {"execution_count": number, "outputs": own}
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")
    print(json.dumps(printed(outputs)))


if __name__ == "__main__":
    main(sys.argv[1:])
