"""The notebooks run from end to end as a reader would run them, and show pictures."""

import os
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))


def run(notebook: Path, folder: Path) -> nbformat.NotebookNode:
    """The notebook after a run in `folder`."""
    read = nbformat.read(notebook, as_version=4)
    return NotebookClient(read, timeout=900, resources={"metadata": {"path": str(folder)}}).execute()


@pytest.mark.timeout(1000)
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_and_shows_pictures(notebook, tmp_path, monkeypatch):
    (tmp_path / "models").symlink_to(ROOT / "models")
    folder = tmp_path / "examples" / "notebooks"
    folder.mkdir(parents=True)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]))
    outputs = [output for cell in run(notebook, folder).cells for output in cell.get("outputs", [])]
    text = "".join(output.get("text", "") for output in outputs if output.output_type == "stream")
    assert any("image/png" in output.get("data", {}) for output in outputs)
    if notebook.stem == "draw_and_compare":
        assert (folder / "out" / "comparison.html").is_file(), text
    else:
        before, after = (float(text.partition(f" {word}")[0].split()[-1]) for word in ("before", "after"))
        assert 0 < after < before
        assert (folder / "out" / "student" / "model_index.json").is_file()


if __name__ == "__main__":  # python tests/test_notebooks.py: runs them in their place and keeps what they show
    for file in NOTEBOOKS:
        nbformat.write(run(file, file.parent), file)
        print(file, "run", file=sys.stderr)
