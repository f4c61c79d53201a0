"""Which of this machine's addresses and interfaces leads to another machine."""

import fcntl
import socket
import struct

SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of an interface, netdevice(7)


def address_towards(host: str) -> str:
    """The address of this machine from which it would reach `host`; nothing is sent. Raises OSError for a host that
    has no address, or to which no way leads."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))  # a datagram socket connects without a word on the wire; any port does
        return probe.getsockname()[0]


def interface_of(address: str) -> str | None:
    """The name of the interface that has this IPv4 address; None where there is none, as for a second loopback one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asker:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(asker, SIOCGIFADDR, struct.pack("256s", name.encode()))
            except OSError:
                continue  # an interface without an address
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None
