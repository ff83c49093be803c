"""tour.ipynb, made from the Markdown of sets/tour.md: its Python blocks are cells of code, all else is text."""

import re


def notebook(text):
    """The notebook as a dict, nbformat 4.5."""
    cells = []
    for number, part in enumerate(re.split(r"```(?:python)?\n", text)):  # text and code in turns
        if part.strip():
            cell = dict(id=f"cell-{number}", metadata={}, source=part.strip().splitlines(keepends=True))
            code = dict(cell_type="code", execution_count=None, outputs=[])
            cells.append({**cell, **(code if number % 2 else dict(cell_type="markdown"))})
    kernel = dict(display_name="Python 3", name="python3")
    return dict(cells=cells, metadata=dict(kernelspec=kernel, language_info=dict(name="python")), nbformat=4,
                nbformat_minor=5)
