"""flannelctl: look at a node's network, wanted beside actual."""

from __future__ import annotations

import json
import os
import sys
from contextlib import closing
from pathlib import Path

import click
import yaml

from cni import __version__
from cni.errors import NetworkError
from cni.net.kernel import NetlinkKernel
from flanneld import snapshot, view
from flanneld.backend import build
from flanneld.backend.protocol import desired
from flanneld.table import table

_WORDS = ("leases", *view.KINDS)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="flannelctl")
def cli() -> None:
    """Look at the pod network of this node."""


@cli.command()
@click.argument("what", type=click.Choice(_WORDS))
@click.option(
    "-o",
    "--output",
    type=click.Choice(["table", "json", "yaml"]),
    default="table",
    show_default=True,
    help="How to print it.",
)
@click.option(
    "--state-dir",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("/var/lib/flannel"),
    show_default=True,
    help="The --state-dir of this node's flanneld.",
)
def get(what: str, output: str, state_dir: Path) -> None:
    """List leases, or routes, neighbours and FDB entries as wanted and as they are.

    Run it on the node, in the network namespace of its flanneld. STATE tells whether an entry is ok,
    missing, unexpected, or differs from what the leases ask for.
    """
    node = snapshot.load(state_dir)
    rows = view.leases(node) if what == "leases" else _entries(what, node, str(state_dir / snapshot.NAME))
    if output == "json":
        click.echo(json.dumps(rows, indent=2))
    elif output == "yaml":
        click.echo(yaml.safe_dump(rows, sort_keys=False), nl=False)
    else:
        click.echo(table(*view.cells(what, rows)), nl=False)


def _entries(what: str, node: snapshot.NodeState, source: str) -> list[view.Row]:
    with closing(NetlinkKernel()) as kernel:
        on_link, release = kernel.on_link(node.external.name), os.uname().release
        backend = build(node.config, node.external, source, on_link=on_link, release=release)
        wanted = desired(backend, node.own, node.peers)
        return view.compare(what, wanted, kernel.snapshot(backend.scope(node.config)))


def main() -> None:
    """Entry point of the executable: 0 done, 1 it could not be, 2 wrong usage."""
    try:
        cli.main(prog_name="flannelctl", standalone_mode=False)
    except click.ClickException as exc:
        exc.show()
        sys.exit(exc.exit_code)
    except click.Abort:
        sys.exit(130)
    except NetworkError as exc:
        click.echo(f"flannelctl: {exc}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
