"""The libvirt element as KubeVirt writes it, and QEMU's arguments."""

from __future__ import annotations

from dataclasses import replace
from xml.etree.ElementTree import fromstring

import pytest

from cni.errors import ConfigError
from launcher.domain import GuestInterface, interface_element, interface_xml, qemu_arguments

GUEST = GuestInterface(tap="tap0", mac="0A:58:0A:F4:01:07", mtu=1450, network="default")


def test_the_plain_element() -> None:
    assert interface_xml(GUEST) == (
        '<interface type="ethernet"><source /><target dev="tap0" managed="no" />'
        '<model type="virtio-non-transitional" /><mac address="0a:58:0a:f4:01:07" /><mtu size="1450" />'
        '<alias name="ua-default" /><rom enabled="no" /></interface>'
    )


def test_the_element_with_everything() -> None:
    guest = replace(
        GUEST,
        model="virtio-transitional",
        queues=4,
        boot_order=2,
        link_up=False,
        protected=True,
        acpi_index=7,
        pci_address="0000:81:1F.7",
        network="red",
    )
    assert interface_xml(guest) == (
        '<interface type="ethernet">'
        '<address type="pci" domain="0x0000" bus="0x81" slot="0x1f" function="0x7" /><source />'
        '<target dev="tap0" managed="no" /><model type="virtio-transitional" />'
        '<mac address="0a:58:0a:f4:01:07" /><mtu size="1450" /><boot order="2" /><link state="down" />'
        '<alias name="ua-red" /><driver name="vhost" queues="4" iommu="on" /><rom enabled="no" />'
        '<acpi index="7" /></interface>'
    )


@pytest.mark.parametrize(
    ("guest", "driver"),
    [
        (GUEST, None),
        (replace(GUEST, queues=1), {"name": "vhost", "queues": "1"}),
        (replace(GUEST, protected=True), {"name": "vhost", "iommu": "on"}),
        (replace(GUEST, model="e1000", queues=1), None),
        (replace(GUEST, model="e1000", protected=True), None),
    ],
)
def test_the_driver_is_named_for_virtio_with_a_reason_only(
    guest: GuestInterface, driver: dict[str, str] | None
) -> None:
    found = interface_element(guest).find("driver")
    assert (found.attrib if found is not None else None) == driver


@pytest.mark.parametrize(
    ("guest", "disabled"),
    [
        (GUEST, True),
        (replace(GUEST, architecture="arm64"), True),
        (replace(GUEST, architecture="s390x", model="virtio"), False),
        (replace(GUEST, boot_order=1), False),
        (replace(GUEST, boot_order=1, protected=True), True),
    ],
)
def test_no_boot_rom_without_a_place_in_the_boot_order(guest: GuestInterface, disabled: bool) -> None:
    assert (interface_element(guest).find("rom") is not None) is disabled


def test_plain_arguments() -> None:
    assert qemu_arguments(GUEST) == [
        "-netdev",
        "tap,id=net-default,ifname=tap0,script=no,downscript=no",
        "-device",
        "virtio-net-pci,netdev=net-default,mac=0a:58:0a:f4:01:07,host_mtu=1450",
    ]


def test_arguments_with_queues_in_the_kernel() -> None:
    assert qemu_arguments(replace(GUEST, queues=4, vhost=True, boot_order=1)) == [
        "-netdev",
        "tap,id=net-default,ifname=tap0,script=no,downscript=no,queues=4,vhost=on",
        "-device",
        "virtio-net-pci,netdev=net-default,mac=0a:58:0a:f4:01:07,host_mtu=1450,mq=on,vectors=10,bootindex=1",
    ]


@pytest.mark.parametrize("queues", [0, 1])
def test_a_tap_with_one_queue_is_opened_as_one(queues: int) -> None:
    assert "queues" not in " ".join(qemu_arguments(replace(GUEST, queues=queues)))


def test_other_models_have_no_mtu_to_tell() -> None:
    assert (
        qemu_arguments(replace(GUEST, model="e1000"))[3] == "e1000,netdev=net-default,mac=0a:58:0a:f4:01:07"
    )


def test_a_comma_in_a_name_is_doubled() -> None:
    assert ",ifname=tap,,0,script=no," in qemu_arguments(replace(GUEST, tap="tap,0"))[1]


@pytest.mark.parametrize("tap", ["tap&0", 'tap"0', "tap<0"])
def test_names_are_quoted_in_xml(tap: str) -> None:
    text = interface_xml(replace(GUEST, tap=tap))
    target = fromstring(text).find("target")  # noqa: S314  # written a line above
    assert target is not None and target.get("dev") == tap


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mac": "abcd"}, "MAC 'abcd' is not valid"),
        ({"mac": "01:00:5e:00:00:01"}, "a guest has a unicast address"),
        ({"mac": "00:00:00:00:00:00"}, "and not all zeros"),
        ({"tap": ""}, "tap '' is not valid"),
        ({"tap": "tap 0"}, "tap 'tap 0' is not valid"),
        ({"tap": "a" * 16}, "has 1 to 15 bytes"),
        ({"tap": "ä" * 8}, "has 1 to 15 bytes"),
        ({"network": "a,b"}, "network 'a,b' is not valid"),
        ({"mtu": 67}, "MTU 67 is not valid"),
        ({"mtu": 65536}, "MTU 65536 is not valid"),
        ({"model": "virtio-net"}, "model 'virtio-net' is not known: give one of virtio, "),
        ({"queues": 257}, "257 queues are not valid for virtio-non-transitional"),
        ({"queues": -1}, "-1 queues"),
        ({"queues": 2, "model": "e1000"}, "2 queues are not valid for e1000"),
        ({"boot_order": 0}, "boot order 0"),
        ({"acpi_index": 0}, "ACPI index 0"),
        ({"acpi_index": 16384}, "ACPI index 16384"),
        ({"pci_address": "81:01.0"}, "PCI address '81:01.0' is not valid"),
        ({"pci_address": "0000:81:20.0"}, "give one like 0000:81:01.0"),
    ],
)
def test_what_no_hypervisor_takes_is_refused(change: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        replace(GUEST, **change)  # type: ignore[arg-type]  # each value is right for its field
