"""What stands in two places of the project says the same."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_pre_commit() -> None:
    """A commit is checked with exactly what CI lints."""
    step = (ROOT / ".ci" / "run").read_text().partition('step "lint, format, types"\n')[2].partition("\n\n")[0]
    hooks = re.findall(r"entry: (.*)", (ROOT / ".pre-commit-config.yaml").read_text())
    assert hooks
    assert [f".venv/bin/{hook}" for hook in hooks] == step.splitlines()


def test_pythons() -> None:
    """CI runs on the lowest Python that is supported, and on each that the package names."""
    settings = (ROOT / "pyproject.toml").read_text()
    [versions] = re.findall(r"python: \[(.*)\]", (ROOT / ".github" / "workflows" / "ci.yml").read_text())
    tested = re.findall(r'"([\d.]+)"', versions)
    assert f'requires-python = ">={tested[0]}"' in settings
    assert set(re.findall(r"Python :: (3\.\d+)", settings)) <= set(tested)
