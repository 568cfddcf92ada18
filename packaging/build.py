"""Build the programs: dist/cni-bin (the CNI plugins) and dist/bin (flanneld, flannelctl, virt-launcher).

    dist/cni-bin/flannel              the shim, a static executable; without a C compiler a link to the next
    dist/cni-bin/flannel-lib/flannel  the plugins frozen, for when the daemon does not serve
    dist/cni-bin/optional/*           the other names that the same executable answers to

Each folder is complete: copied anywhere it runs without Python on the machine. The executables keep
their modules and libraries in one folder beside them, so that they start without unpacking anything.

PyInstaller finds what belongs into the folder. With a C compiler the executables are our own, `starter.c`.
"""

from __future__ import annotations

import py_compile
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

PACKAGING = Path(__file__).resolve().parent
ROOT = PACKAGING.parent
BUILD = ROOT / "build"
DIST = ROOT / "dist"
PLUGINS = DIST / "cni-bin"
OPTIONAL = ("bridge", "host-local", "portmap", "loopback")
PROGRAMS = ("flanneld", "flannelctl", "virt-launcher")
WARNINGS = ("-Wall", "-Wextra", "-Werror")
# In two pieces instead of four the shim takes fewer page faults at its start.
COMPILE = ("-static", "-O2", *WARNINGS, "-s", "-Wl,-z,noseparate-code,-z,norelro,--build-id=none")
# Libraries, and what they need in turn, are looked for beside the program.
STARTER = ("-no-pie", "-O2", *WARNINGS, "-rdynamic", "-s", "-Wl,--disable-new-dtags")
STARTER_LIBRARIES = "-Wl,-rpath,$ORIGIN/flannel-lib:$ORIGIN"
# Most of the shim's time is the start of a process. With musl that takes a quarter of a millisecond less:
# glibc asks the processor dozens of questions (CPUID) first, which a virtual machine takes to its host.
COMPILERS = ("musl-gcc", "cc")


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
    target.parent.mkdir(parents=True, exist_ok=True)
    (made / target.name).replace(target)


def compile_shim() -> None:
    """Put the shim at dist/cni-bin/flannel, or the frozen plugin where there is no C compiler.

    Raises SystemExit with the compiler's own words when it fails.
    """
    target = PLUGINS / "flannel"
    target.unlink(missing_ok=True)
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        print("no C compiler (Debian package musl-tools): no shim, each call starts the frozen plugin")
        target.symlink_to("flannel-lib/flannel")
        return
    _compile(compiler, *COMPILE, "-o", str(target), str(ROOT / "cni" / "shim" / "shim.c"))


def _compile(*command: str) -> None:
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit(f"{done.stdout}error: {' '.join(command)} failed with status {done.returncode}")


def compile_starter() -> Path | None:
    """`starter.c` with Python inside; None, and PyInstaller's own starters stay, where that cannot be had.

    Raises SystemExit with the compiler's own words when it fails.
    """
    compiler, setting = shutil.which("cc"), sysconfig.get_config_vars()
    python = Path(setting["LIBPL"], setting["LIBRARY"])
    if compiler is None or not python.exists():
        print("no C compiler or no Python to link (Debian packages gcc, python3-dev): programs run slower")
        return None
    target = BUILD / "starter"
    version = f'-DPYTHON_VERSION="{setting["py_version_short"]}"'
    libraries = [word for name in ("LIBS", "SYSLIBS", "MODLIBS") for word in setting[name].split()]
    sources = [f"-isystem{setting['INCLUDEPY']}", version, str(PACKAGING / "starter.c"), str(python)]
    _compile(compiler, *STARTER, *sources, STARTER_LIBRARIES, *libraries, "-o", str(target))
    return target


def install_starter(starter: Path, programs: list[Path], folder: Path) -> None:
    """Put it in the place of the executables, whose modules are in `folder`."""
    for program in programs:
        program.unlink()
        shutil.copy2(starter, program)
        entry = f"entry_{program.name.replace('-', '_')}"
        source, compiled = PACKAGING / f"{entry}.py", folder / f"{entry}.pyc"
        py_compile.compile(str(source), cfile=str(compiled), dfile=source.name, doraise=True)
    for library in folder.glob("libpython*"):
        library.unlink()


def link_names() -> None:
    """The other plugins' names, apart from `flannel`: nobody's own plugins are replaced unasked."""
    folder = PLUGINS / "optional"
    folder.mkdir(exist_ok=True)
    for name in OPTIONAL:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to("../flannel")


def main() -> None:
    """Build both folders."""
    freeze("flannel", "cni-bin/flannel-lib")
    compile_shim()
    link_names()
    freeze("flanneld", "bin")
    starter = compile_starter()
    if starter is not None:
        plugins = PLUGINS / "flannel-lib"
        install_starter(starter, [plugins / "flannel"], plugins)
        programs = DIST / "bin"
        install_starter(starter, [programs / name for name in PROGRAMS], programs / "flannel-lib")


if __name__ == "__main__":
    main()
