"""The two init steps of the manifest: install-conf and install-cni-plugin, as programs."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "packaging" / "image"
CONF = SCRIPTS / "install-conf"
PLUGIN = SCRIPTS / "install-cni-plugin"
HOUR_S = 3600.0


def run(script: Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(script), *map(str, words)], capture_output=True, text=True, check=False, timeout=30
    )


def install(script: Path, *words: str | Path) -> None:
    done = run(script, *words)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("script", [CONF, PLUGIN])
@pytest.mark.parametrize("words", [(), ("/etc/hostname",), ("/etc/hostname", "/tmp/a", "/tmp/b")])
def test_usage(script: Path, words: tuple[str, ...]) -> None:
    done = run(script, *words)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"Usage: {script} SOURCE TARGET\n"


# ---- install-conf


@pytest.fixture
def net_d(tmp_path: Path) -> Path:
    folder = tmp_path / "net.d"
    folder.mkdir()
    return folder


def test_conf_is_copied_with_its_mode(tmp_path: Path, net_d: Path) -> None:
    """The source is a symbolic link, as every file of a ConfigMap is."""
    (tmp_path / "data").write_text("{}\n")
    (tmp_path / "data").chmod(0o640)
    (tmp_path / "source").symlink_to("data")
    install(CONF, tmp_path / "source", net_d / "10-flannel.conflist")
    target = net_d / "10-flannel.conflist"
    assert target.read_text() == "{}\n"
    assert target.lstat().st_mode == 0o100640
    assert os.listdir(net_d) == ["10-flannel.conflist"]


def test_conf_is_replaced_in_one_step(tmp_path: Path, net_d: Path) -> None:
    """While the source is still being read the old file stands, and a reader of it keeps what it opened."""
    target = net_d / "10-flannel.conflist"
    target.write_text("old\n")
    source = tmp_path / "source"
    os.mkfifo(source)
    with target.open() as reader, subprocess.Popen([CONF, source, target]) as process:
        with source.open("w") as writer:
            writer.write("half")
            writer.flush()
            (temporary,) = [name for name in os.listdir(net_d) if name != target.name]
            assert temporary.startswith(".10-flannel.conflist.tmp")
            assert target.read_text() == "old\n"
        assert process.wait(timeout=10) == 0
        assert reader.read() == "old\n"
    assert target.read_text() == "half"
    assert os.listdir(net_d) == [target.name]


def test_conf_that_is_interrupted_leaves_nothing(tmp_path: Path, net_d: Path) -> None:
    source = tmp_path / "source"
    os.mkfifo(source)
    argv = [CONF, source, net_d / "10-flannel.conflist"]
    with subprocess.Popen(argv, start_new_session=True) as process, source.open("w"):
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(timeout=10) == 1
    assert os.listdir(net_d) == []


def test_conf_that_cannot_be_installed(tmp_path: Path, net_d: Path) -> None:
    source = tmp_path / "source"
    source.write_text("{}\n")
    (net_d / "taken").mkdir()
    attempts = [
        (tmp_path / "missing", net_d / "x"),
        (source, tmp_path / "no" / "x"),
        (source, net_d / "taken"),
    ]
    for attempt in attempts:
        done = run(CONF, *attempt)
        assert done.returncode == 1 and done.stderr
    assert os.listdir(net_d) == ["taken"]


# ---- install-cni-plugin


@pytest.fixture
def target(tmp_path: Path) -> Path:
    (tmp_path / "bin").mkdir()
    return tmp_path / "bin" / "flannel"


def plugin(folder: Path, text: str) -> Path:
    """A program that needs its library folder: it prints the text in there once its stdin has ended."""
    (folder / "flannel-lib").mkdir(parents=True)
    (folder / "flannel-lib" / "text").write_text(text)
    program = folder / "flannel"
    program.write_text(
        '#!/bin/sh\ncat >/dev/null\nread -r x <"$(dirname "$0")/flannel-lib/text"; echo "$x"\n'
    )
    program.chmod(0o755)
    return folder


def output(program: Path) -> str:
    """What `program` prints, started as the kernel starts it: by the path of the file itself."""
    return subprocess.run(
        [program.resolve()], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True, timeout=10
    ).stdout.strip()


def folders(target: Path) -> list[Path]:
    return sorted(target.parent.glob(".flannel-*"))


def test_plugin_is_installed_with_its_libraries(tmp_path: Path, target: Path) -> None:
    install(PLUGIN, plugin(tmp_path / "one", "one\n"), target)
    assert output(target) == "one"
    (folder,) = folders(target)
    assert folder.stat().st_mode == 0o040755
    assert set(os.listdir(target.parent)) == {folder.name, "flannel"}
    assert set(os.listdir(folder)) == {"flannel", "flannel-lib"}


def test_plugin_that_is_there_already_is_left_alone(tmp_path: Path, target: Path) -> None:
    one = plugin(tmp_path / "one", "one\n")
    install(PLUGIN, one, target)
    before = target.lstat().st_ctime_ns, folders(target)
    install(PLUGIN, one, target)
    assert (target.lstat().st_ctime_ns, folders(target)) == before


def test_plugin_that_runs_has_its_libraries_until_its_end(tmp_path: Path, target: Path) -> None:
    install(PLUGIN, plugin(tmp_path / "one", "one\n"), target)
    with subprocess.Popen(
        [target.resolve()], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as running:
        for text in ("two", "three"):
            install(PLUGIN, plugin(tmp_path / text, f"{text}\n"), target)
            assert output(target) == text
        assert running.communicate(timeout=10)[0] == "one\n"


def test_plugin_folders_go_an_hour_after_they_were_replaced(tmp_path: Path, target: Path) -> None:
    install(PLUGIN, plugin(tmp_path / "one", "one\n"), target)
    (one,) = folders(target)
    long_ago = time.time() - 30 * 24 * HOUR_S
    os.utime(one, (long_ago, long_ago))
    stranger = target.parent / ".flannel-personal"
    stranger.write_text("not ours")
    os.utime(stranger, (long_ago, long_ago))
    install(PLUGIN, plugin(tmp_path / "two", "two\n"), target)
    # Installed a month ago, but in use until just now.
    assert one in folders(target)
    os.utime(one, (time.time() - 1.1 * HOUR_S,) * 2)
    install(PLUGIN, plugin(tmp_path / "three", "three\n"), target)
    assert one not in folders(target)
    assert len([folder for folder in folders(target) if folder.is_dir()]) == 2
    assert stranger.exists()
    assert output(target) == "three"


@pytest.mark.parametrize("copy", [["cp", "-f"], ["busybox", "cp", "-f"]], ids=["gnu", "busybox"])
def test_plugin_in_turns_with_upstreams(tmp_path: Path, target: Path, copy: list[str]) -> None:
    """Upstream's plugin is one file, which its init step copies over whatever is there."""
    upstream = tmp_path / "upstream"
    upstream.write_text("#!/bin/sh\necho upstream\n")
    upstream.chmod(0o755)
    one = plugin(tmp_path / "one", "one\n")
    shutil.copy(upstream, target)
    for _ in range(2):
        install(PLUGIN, one, target)
        assert output(target) == "one"
        subprocess.run([*copy, upstream, target], check=True, timeout=10)
        assert output(target) == "upstream"


def test_plugin_installed_by_several_at_a_time(tmp_path: Path, target: Path) -> None:
    sources = [plugin(tmp_path / f"{n}", f"{n}\n") for n in range(6)]
    processes = [subprocess.Popen([PLUGIN, source, target]) for source in sources]
    assert [process.wait(timeout=30) for process in processes] == [0] * len(sources)
    assert output(target) in map(str, range(6))


def test_plugin_installation_that_is_ended_at_the_switch(tmp_path: Path, target: Path) -> None:
    """Whether the signal comes before the rename or after it, there is a program that works."""
    install(PLUGIN, plugin(tmp_path / "one", "one\n"), target)
    (tmp_path / "mv").mkdir()
    mv = tmp_path / "mv" / "mv"
    environment = {**os.environ, "PATH": f"{mv.parent}:{os.environ['PATH']}"}
    for step, left in (("kill $PPID", "one"), ('/bin/mv "$@"; kill $PPID', "two")):
        mv.write_text(f"#!/bin/sh\n{step}\n")
        mv.chmod(0o755)
        two = tmp_path / "two"
        argv = [PLUGIN, two if two.exists() else plugin(two, "two\n"), target]
        assert subprocess.run(argv, env=environment, check=False, timeout=30).returncode == 1
        assert output(target) == left
    assert len(folders(target)) == 2


def test_plugin_that_cannot_be_installed(tmp_path: Path, target: Path) -> None:
    one = plugin(tmp_path / "one", "one\n")
    install(PLUGIN, one, target)
    (target.parent / "taken").mkdir()
    before = sorted(os.listdir(target.parent))
    attempts = [(tmp_path / "missing", target), (one, tmp_path / "no" / "x"), (one, target.parent / "taken")]
    for attempt in attempts:
        done = run(PLUGIN, *attempt)
        assert done.returncode == 1 and done.stderr
    assert sorted(os.listdir(target.parent)) == before
    assert output(target) == "one"
