"""A netlink socket that somebody else has used before: the daemon, killed in the middle of a call."""

from __future__ import annotations

import os
import socket

from cni.net import nlmsg, rtlink
from cni.net.nlsocket import ROUTE, NetlinkSocket


def test_answers_left_by_who_had_the_socket_before_are_not_ours() -> None:
    kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC
    with socket.socket(socket.AF_NETLINK, kind, socket.NETLINK_ROUTE) as shared:
        for number in range(1, 200):  # acknowledged, refused, and dumps that nobody reads to their end
            message, flags, body = rtlink.get_link("no-such-link") if number % 2 else rtlink.get_link("lo")
            shared.send(nlmsg.message(message, flags | nlmsg.NLM_F_ACK, number, body))
        shared.send(nlmsg.message(*_dump(), 200, rtlink.get_addresses(0, 0)[1]))
        heir = NetlinkSocket(ROUTE, os.dup(shared.fileno()))
        heir.start_afresh()
        found = heir.request(*rtlink.get_link("lo"))
        assert (found.errno, rtlink.LinkState(found.messages[0].body).name) == (0, "lo")
        assert heir.request(*rtlink.get_link("no-such-link")).errno == 19
        assert heir.dump(*rtlink.get_addresses(4, 0))
        heir.close()


def _dump() -> tuple[int, int]:
    return rtlink.RTM_GETADDR, nlmsg.NLM_F_DUMP


def test_a_refusal_in_the_middle_is_told_and_the_rest_is_carried_out() -> None:
    route = NetlinkSocket(ROUTE)
    asked = [rtlink.get_link("lo"), rtlink.get_link("no-such-link"), rtlink.set_link(1 << 20, up=True)]
    for last in (rtlink.get_link("lo"), rtlink.get_link("no-such-link"), rtlink.set_link(1 << 21, up=True)):
        answers = route.transact([*asked, last])
        refused = 0 if last == asked[0] else 19
        assert [answer.errno for answer in answers] == [0, 19, 19, refused]
        assert [len(answer.messages) for answer in answers] == [1, 0, 0, not refused]
    route.close()
