"""Every Python block of the documents runs, in order, one namespace for each document."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
WITH_CODE = [path for path in DOCUMENTS if BLOCK.search(path.read_text())]
# What has to be there beside torch: a package, or a device.
NEEDS = {"docs/export.md": ("onnxscript",)}
ON_A_GPU = {"docs/triton-kernels.md"}


def _id(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("document", WITH_CODE, ids=_id)
def test_code_blocks_run(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = _id(document)
    if name in ON_A_GPU and not torch.cuda.is_available():
        pytest.skip("its code asks for a GPU")
    for package in NEEDS.get(name, ()):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "document"}
    text = document.read_text()
    for found in BLOCK.finditer(text):
        # Blank lines in front, so that a traceback has the document's line numbers.
        code = "\n" * (text[: found.start()].count("\n") + 1) + found[1]
        exec(compile(code, str(document), "exec"), namespace)


def test_code_is_marked_as_python() -> None:
    """A block without a language would be neither coloured nor run."""
    unmarked = [
        _id(path)
        for path in DOCUMENTS
        for fence in re.findall(r"^```(.*)$", path.read_text(), re.MULTILINE)[::2]
        if fence not in ("python", "bash", "cpp", "text")
    ]
    assert unmarked == []
