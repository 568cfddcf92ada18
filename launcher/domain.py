"""What a hypervisor is told of the guest's interface: a libvirt element, or QEMU's arguments.

Decision: QEMU gets `virtio-net-pci` for the model `virtio-non-transitional` too. On a PCIe slot it is that
device; on an old machine type it can do more, and every guest driver takes it. libvirt gets the model to
the letter, as KubeVirt writes it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from xml.etree.ElementTree import Element, SubElement, tostring

from cni.errors import ConfigError
from launcher.ipv6.packet import format_mac, parse_mac

# libvirt's model names, and the devices that QEMU has for them.
_DEVICES = {
    "virtio": "virtio-net-pci",
    "virtio-non-transitional": "virtio-net-pci",
    "virtio-transitional": "virtio-net-pci-transitional",
    "e1000": "e1000",
    "e1000e": "e1000e",
    "igb": "igb",
    "ne2k_pci": "ne2k_pci",
    "pcnet": "pcnet",
    "rtl8139": "rtl8139",
}
_MAX_QUEUES = 256  # of a tap device (Linux, MAX_TAP_QUEUES)
_MAX_ACPI_INDEX = 16383
_PCI_ADDRESS = re.compile(r"([0-9a-f]{4}):([0-9a-f]{2}):([01][0-9a-f])\.([0-7])")
_INTERFACE = re.compile(r"[^\s/:]{1,15}")  # the kernel's rule: 15 bytes, no slash, no colon, no blank
_NETWORK = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True, slots=True)
class GuestInterface:
    """The guest's side of one pod interface. Raises ConfigError for a value that no hypervisor takes.

    `network` is its name in the VM's specification. `queues` of 0 leaves the number to libvirt; more than
    0 is for virtio models. `boot_order` counts from 1; an interface without one has no boot ROM on
    machines that have any (amd64, arm64). `protected`: the guest's memory is encrypted (launch security).
    `vhost` asks QEMU to move packets in the kernel; libvirt decides that by itself.
    """

    tap: str
    mac: str
    mtu: int
    network: str = "default"
    model: str = "virtio-non-transitional"
    queues: int = 0
    boot_order: int | None = None
    link_up: bool = True
    protected: bool = False
    acpi_index: int | None = None
    pci_address: str | None = None
    architecture: str = "amd64"
    vhost: bool = False

    def __post_init__(self) -> None:
        mac = parse_mac(self.mac)
        if mac[0] & 1 or not any(mac):
            raise ConfigError(
                f"MAC {self.mac!r} is not valid: a guest has a unicast address, and not all zeros"
            )
        if not _INTERFACE.fullmatch(self.tap) or len(self.tap.encode()) > 15:
            raise ConfigError(f"tap {self.tap!r} is not valid: an interface name has 1 to 15 bytes")
        if not _NETWORK.fullmatch(self.network):
            raise ConfigError(
                f"network {self.network!r} is not valid: give letters, digits, '.', '_' and '-'"
            )
        if not 68 <= self.mtu <= 0xFFFF:
            raise ConfigError(f"MTU {self.mtu} is not valid: give 68 to 65535")
        if self.model not in _DEVICES:
            raise ConfigError(f"model {self.model!r} is not known: give one of {', '.join(_DEVICES)}")
        if not 0 <= self.queues <= (_MAX_QUEUES if self.is_virtio else 1):
            raise ConfigError(
                f"{self.queues} queues are not valid for {self.model}: give 0 to {_MAX_QUEUES} to a virtio "
                f"model, 0 or 1 to another"
            )
        if self.boot_order is not None and self.boot_order < 1:
            raise ConfigError(f"boot order {self.boot_order} is not valid: give 1 or more")
        if self.acpi_index is not None and not 1 <= self.acpi_index <= _MAX_ACPI_INDEX:
            raise ConfigError(f"ACPI index {self.acpi_index} is not valid: give 1 to {_MAX_ACPI_INDEX}")
        if self.pci_address is not None and not _PCI_ADDRESS.fullmatch(self.pci_address.lower()):
            raise ConfigError(f"PCI address {self.pci_address!r} is not valid: give one like 0000:81:01.0")

    @property
    def is_virtio(self) -> bool:
        return self.model.startswith("virtio")


def interface_element(guest: GuestInterface) -> Element:
    """The libvirt `<interface>` element that attaches a tap made by us, its children in KubeVirt's order."""
    root = Element("interface", type="ethernet")
    address = _PCI_ADDRESS.fullmatch((guest.pci_address or "").lower())
    if address:
        names = ("domain", "bus", "slot", "function")
        numbers = {name: f"0x{text}" for name, text in zip(names, address.groups(), strict=True)}
        SubElement(root, "address", {"type": "pci", **numbers})
    SubElement(root, "source")
    SubElement(root, "target", dev=guest.tap, managed="no")
    SubElement(root, "model", type=guest.model)
    SubElement(root, "mac", address=_mac(guest))
    SubElement(root, "mtu", size=str(guest.mtu))
    if guest.boot_order is not None:
        SubElement(root, "boot", order=str(guest.boot_order))
    if not guest.link_up:
        SubElement(root, "link", state="down")
    SubElement(root, "alias", name=f"ua-{guest.network}")
    driver = _driver(guest)
    if driver:
        SubElement(root, "driver", {"name": "vhost", **driver})
    if (guest.boot_order is None or guest.protected) and guest.architecture in ("amd64", "arm64"):
        SubElement(root, "rom", enabled="no")
    if guest.acpi_index is not None:
        SubElement(root, "acpi", index=str(guest.acpi_index))
    return root


def interface_xml(guest: GuestInterface) -> str:
    """The element as text on one line, empty elements closed at once: `<source />`."""
    return tostring(interface_element(guest), encoding="unicode")


def _driver(guest: GuestInterface) -> dict[str, str]:
    if not guest.is_virtio:
        return {}
    queues = {"queues": str(guest.queues)} if guest.queues > 0 else {}
    return {**queues, "iommu": "on"} if guest.protected else queues


def qemu_arguments(guest: GuestInterface) -> list[str]:
    """The words of QEMU's command line that attach the tap, ready for `exec`.

    Link state, PCI address, ACPI index, boot ROM and encryption are libvirt's alone: on a command line
    they depend on the rest of it.
    """
    netdev = f"net-{guest.network}"
    # QEMU writes a comma within a value twice; an interface name may have one.
    backend = ["tap", f"id={netdev}", f"ifname={guest.tap.replace(',', ',,')}", "script=no", "downscript=no"]
    device = [_DEVICES[guest.model], f"netdev={netdev}", f"mac={_mac(guest)}"]
    if guest.is_virtio:
        device.append(f"host_mtu={guest.mtu}")
    if guest.queues > 1:
        backend.append(f"queues={guest.queues}")
        # A vector for each queue's two rings, one for changes of the configuration, one for control.
        device += ["mq=on", f"vectors={2 * guest.queues + 2}"]
    if guest.vhost:
        backend.append("vhost=on")
    if guest.boot_order is not None:
        device.append(f"bootindex={guest.boot_order}")
    return ["-netdev", ",".join(backend), "-device", ",".join(device)]


def _mac(guest: GuestInterface) -> str:
    return format_mac(parse_mac(guest.mac))
