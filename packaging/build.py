"""Freeze the programs: dist/cni-bin (the CNI plugin) and dist/bin (flanneld, flannelctl).

Each folder is complete: copied anywhere it runs without Python on the machine. The executables keep
their libraries in one folder beside them, so that they start without unpacking anything.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

PACKAGING = Path(__file__).resolve().parent
ROOT = PACKAGING.parent
BUILD = ROOT / "build"
DIST = ROOT / "dist"


def freeze(spec: str, folder: str) -> None:
    """Run PyInstaller on one spec file and put what it made at dist/FOLDER, in place of the old one.

    Raises SystemExit with PyInstaller's own words when it fails; the old folder then stays.
    """
    made = BUILD / "made"
    command = [sys.executable, "-m", "PyInstaller", "--noconfirm", "--log-level=WARN"]
    command += [f"--distpath={made}", f"--workpath={BUILD / spec}", str(PACKAGING / f"{spec}.spec")]
    done = subprocess.run(
        command, check=False, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        sys.exit(f"{done.stdout}error: freezing {spec}.spec failed with status {done.returncode}")
    target = DIST / folder
    shutil.rmtree(target, ignore_errors=True)
    DIST.mkdir(exist_ok=True)
    (made / folder).replace(target)


def main() -> None:
    """Build both folders."""
    freeze("flannel", "cni-bin")
    freeze("flanneld", "bin")


if __name__ == "__main__":
    main()
