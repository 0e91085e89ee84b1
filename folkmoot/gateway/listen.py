"""Addresses to listen on, and who reaches them. Light: the command line asks it, too."""

import ipaddress

OPEN_WITHOUT_KEYS = (
    "on an address that others can reach, callers must be asked who they are: give --require-keys (and make keys with "
    "`folkmoot keys create`), or --tls-client-ca, or --listen on 127.0.0.1; --insecure serves whoever comes"
)


def is_local(listen: str) -> bool:
    """Whether only processes of this machine reach an address: loopback, or a unix socket."""
    if listen.startswith("unix:"):
        return True
    host = listen.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
