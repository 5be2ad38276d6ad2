from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# An interpreter that makes environments of itself and writes down what pip is asked to install.
FAKE_PYTHON = r"""#!/usr/bin/env bash
case "$1 $2" in
    "-m venv") mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; echo "PATH=\"$3/bin:\$PATH\"" > "$3/bin/activate" ;;
    "-m pip") echo "$*" >> "$LOG"; [[ ! -e "$LOG.fail" ]] ;;
    "-c "*) [[ ! -e "$LOG.old" ]] ;;
    *) exit 1 ;;
esac
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    folder = tmp_path / "clone"
    (folder / "scripts").mkdir(parents=True)
    for name in ("scripts/setup_env.sh", "requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, folder / name)
    (tmp_path / "python").write_text(FAKE_PYTHON)
    (tmp_path / "python").chmod(0o755)
    return folder


def source(clone: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Sources the script as the others do, and says which python is then the first."""
    clean = {key: value for key, value in os.environ.items() if key not in ("VIRTUAL_ENV", "CONDA_PREFIX")}
    given = {"PYTHON": str(clone.parent / "python"), "LOG": str(clone.parent / "log"), **environment}
    command = f"set -euo pipefail; source {clone}/scripts/setup_env.sh jettclip && command -v python"
    return subprocess.run(["bash", "-c", command], env={**clean, **given}, capture_output=True, text=True, check=False)


def installs(clone: Path) -> int:
    log = clone.parent / "log"
    return len(log.read_text().splitlines()) if log.exists() else 0


def test_an_environment_is_made_once_and_brought_up_to_date_with_the_requirements(clone: Path) -> None:
    first = source(clone)
    assert first.stdout.strip() == str(clone / ".venv/bin/python"), first.stderr
    assert installs(clone) == 2  # the requirements, and the package itself
    assert source(clone).stdout == first.stdout
    assert installs(clone) == 2
    with (clone / "requirements.txt").open("a") as stream:
        stream.write("another\n")
    source(clone)
    assert installs(clone) == 4


def test_an_installation_that_failed_is_done_again(clone: Path) -> None:
    failing = clone.parent / "log.fail"
    failing.touch()
    assert source(clone).returncode != 0
    failing.unlink()
    assert source(clone).returncode == 0
    assert installs(clone) == 3


def test_an_old_python_is_refused(clone: Path) -> None:
    (clone.parent / "log.old").touch()
    refused = source(clone)
    assert refused.returncode != 0
    assert "need Python 3.11 or newer" in refused.stderr
    assert installs(clone) == 0


def test_an_active_environment_that_has_the_package_is_used_as_it_is(clone: Path) -> None:
    used = source(clone, VIRTUAL_ENV=sys.prefix, PATH=f"{sys.prefix}/bin:{os.environ['PATH']}")
    assert used.stdout.strip() == f"{sys.prefix}/bin/python", used.stderr
    assert not (clone / ".venv").exists()


def test_an_active_environment_without_the_package_is_left_alone(clone: Path, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").write_text("#!/usr/bin/env bash\nexit 1\n")
    (tmp_path / "bin/python").chmod(0o755)
    used = source(clone, VIRTUAL_ENV=str(tmp_path), PATH=f"{tmp_path}/bin:{os.environ['PATH']}")
    assert used.stdout.strip() == str(clone / ".venv/bin/python")
