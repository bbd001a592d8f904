"""The notebook runs from top to bottom, and ships with what it printed."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LESSON = ROOT / "lesson.ipynb"


def test_the_lesson_ships_with_its_outputs():
    """A reader without a machine, or on a web page, sees what a cell would print; and no warning of ours."""
    cells = [cell for cell in json.loads(LESSON.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    kinds = [output.get("name", output["output_type"]) for cell in cells for output in cell["outputs"]]
    assert "error" not in kinds and "stderr" not in kinds
    assert sum("image/svg+xml" in output.get("data", {}) for cell in cells for output in cell["outputs"]) >= 3


def test_the_lesson_copies_nothing():
    """A lesson with its own copy of a function teaches something that the project may not do any more."""
    source = "\n".join("".join(cell["source"]) for cell in json.loads(LESSON.read_text())["cells"])
    assert source.count("def ") == 3  # two pictures, and the loop that shows its curve
    called = "train.act train.judge train.learn grpo.loss recipes.advantages p_noise( coin("
    for name in called.split():
        assert name in source, name


def test_the_lesson_runs():
    """Every cell, its assertions included: a renamed function breaks a class in front of its teacher."""
    nbformat = pytest.importorskip("nbformat", reason="pip install nbclient ipykernel")
    client = pytest.importorskip("nbclient", reason="pip install nbclient ipykernel")
    pytest.importorskip("ipykernel", reason="pip install nbclient ipykernel")
    notebook = nbformat.read(LESSON, 4)
    client.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(ROOT)}}).execute()
