"""A VM's network, in a small internet of the test's own: what is allowed works, what is not does not."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SCENES = {
    node.name: ast.get_docstring(node) or ""
    for node in ast.parse((HERE / "scenes.py").read_text(encoding="utf-8")).body
    if isinstance(node, ast.AsyncFunctionDef)
    and any(
        getattr(one, "id", "") == "scene" or getattr(getattr(one, "func", None), "id", "") == "on_network"
        for one in node.decorator_list
    )
}


@pytest.mark.timeout(150)
@pytest.mark.parametrize("scene", SCENES)
def test_scene(scene: str) -> None:
    """Each scene is a process of its own, in namespaces of its own."""
    strict = ["-X", "dev", "-W", "error"]
    command = [sys.executable, str(HERE / "internet.py"), *strict, str(HERE / "scenes.py"), scene]
    done = subprocess.run(command, capture_output=True, text=True, timeout=140, check=False)
    assert (done.returncode, done.stdout) == (0, "done\n"), f"{SCENES[scene]}\n{done.stdout}\n{done.stderr}"
