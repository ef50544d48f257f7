"""The firewall: what a sandbox may reach, as nftables rules that are loaded atomically.

A sandbox reaches the internet and the node's DNS, but no other sandbox, not the host, no private or
link-local address, no cloud metadata service, and no network that the host is connected to. The
slot's own table enforces this where packets leave the machine. The host's table enforces it again
where slots meet, so that it holds even if a slot's rules are wrong.

All namespaces share tables of the host's kernel (neighbours, connections). Packets with an address
other than the guest's own, or of an unneeded protocol, are therefore dropped at the tap before they
reach these tables, and the number of connections per slot is limited.
"""

import ipaddress
from collections.abc import Sequence

from sandyard.server.core.egress import Rules
from sandyard.server.egress.config import EGRESS_PORT

_ANY_SLOT = "syd-"  # what the links of every installation on the host begin with
GUEST_IP = "172.16.0.2"
GATEWAY_IP = "172.16.0.1"
CONNECTIONS_MAX = 4096
SHARE_PORTS = range(20_000, 60_000)
"""The gateway's ports that file servers of workspaces may listen on; a second takes the next."""
_PRIVATE = (
    "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12",
    "192.0.0.0/24", "192.168.0.0/16", "198.18.0.0/15", "224.0.0.0/4", "240.0.0.0/4",
)  # fmt: skip
# Clouds answer their own virtual machines at addresses that look public too: Azure's host endpoint
# (its WireServer and DNS). The others' are in the ranges above: 169.254.169.254 and its neighbours
# (AWS, Google, Azure, Oracle, DigitalOcean), 169.254.170.2 and .23 (AWS containers), 169.254.0.23
# (Tencent), 100.100.100.200 (Alibaba), 192.0.0.192 (Oracle Classic). Those by IPv6
# (fd00:ec2::254, fd20:ce::254, fd00:c1::a9fe:a9fe) cannot be reached: a slot has no IPv6.
_CLOUDS = ("168.63.129.16",)
UNREACHABLE = _PRIVATE + _CLOUDS
"""The ranges that no sandbox reaches, except for what the operator allows."""


def guard_rules(*, tap: str, uplink: str, mac: str, egress_uid: int) -> str:
    """Return the rules at a slot's tap, replacing existing ones.

    They are in a table of their own, so that they can be added to machines that survived an
    upgrade.
    """
    return f"""
table netdev sandyard {{}}
delete table netdev sandyard
table netdev sandyard {{
  chain from_guest {{
    type filter hook ingress device "{tap}" priority filter; policy drop;
    ether saddr != {mac} drop
    ether type arp arp htype 1 arp ptype ip arp saddr ether {mac} arp saddr ip {GUEST_IP} accept
    ether type ip ip saddr {GUEST_IP} ip protocol {{ icmp, tcp, udp }} accept
  }}
}}
table inet sandyard_count {{}}
delete table inet sandyard_count
table inet sandyard_count {{
  chain count {{
    type filter hook prerouting priority filter; policy accept;
    iifname "{tap}" ct state new ct count over {CONNECTIONS_MAX} drop
  }}
}}
table inet sandyard_output {{}}
delete table inet sandyard_output
table inet sandyard_output {{
  chain output {{
    # A file server that its guest has taken over reaches that guest and nothing else. What
    # enforces a sandbox's rules dials for it.
    type filter hook output priority filter; policy drop;
    oifname {{ "lo", "{tap}" }} accept
    oifname "{uplink}" meta l4proto tcp meta skuid {egress_uid} accept
    ct state established,related accept
  }}
}}
"""


def input_rules(*, tap: str) -> str:
    """Return rules that replace those for incoming traffic in a slot of an earlier version.

    That version redirected a port of the gateway to a file server outside the slot. Existing
    redirected connections are reset, so that the next one of the guest is not mistaken for one of
    them.
    """
    return f"""
table inet sandyard_share {{}}
delete table inet sandyard_share
table inet sandyard_redirected {{}}
delete table inet sandyard_redirected
table inet sandyard_redirected {{
  chain forward {{
    type filter hook forward priority filter - 1; policy accept;
    iifname "{tap}" tcp dport 2049 ct status dnat reject with tcp reset
  }}
}}
flush chain inet sandyard input
table inet sandyard {{
  chain input {{
    {_input(tap)}
  }}
}}
"""


def _input(tap: str) -> str:
    ports = f"{SHARE_PORTS.start}-{SHARE_PORTS.stop}"
    return f"""iifname "lo" accept
    ct state established,related accept
    iifname "{tap}" ip saddr != {GUEST_IP} drop
    iifname "{tap}" ip daddr {GATEWAY_IP} meta l4proto {{ tcp, udp }} th dport 53 accept
    iifname "{tap}" ip daddr {GATEWAY_IP} icmp type echo-request accept
    # What `egress_rules` redirect; its port cannot be dialed.
    iifname "{tap}" tcp dport {EGRESS_PORT} ct status dnat accept
    # The slot's own file servers; where none listens, the kernel refuses at once.
    iifname "{tap}" ip daddr {GATEWAY_IP} tcp dport {ports} accept
    iifname "{tap}" ip daddr {GATEWAY_IP} meta l4proto tcp reject with tcp reset"""


def slot_rules(
    *,
    uplink: str,
    tap: str,
    mac: str,
    outer: ipaddress.IPv4Address,
    agent_port: int,
    egress_uid: int,
    allow: Sequence[str],
) -> str:
    """Return the rules inside one slot, whose `tap` already exists.

    `outer` is the slot's address on the host's side. Packets from the host to it are forwarded to
    the guest, except for the agent's port, which has no such address.
    """
    return f"""{guard_rules(tap=tap, uplink=uplink, mac=mac, egress_uid=egress_uid)}
table inet sandyard {{
  chain input {{
    type filter hook input priority filter; policy drop;
    {_input(tap)}
  }}
  chain forward {{
    type filter hook forward priority filter; policy drop;
    iifname "{tap}" ip saddr != {GUEST_IP} drop
    ct state established,related accept
    # A machine that stood still may send on an old connection: it is rejected, not dropped.
    iifname "{tap}" tcp flags & (fin | syn | rst | ack) != syn reject with tcp reset
    {_accept(allow, f'iifname "{tap}" oifname "{uplink}"')}
    iifname "{tap}" ip daddr {{ {", ".join(UNREACHABLE)} }} reject with icmp type admin-prohibited
    iifname "{tap}" oifname "{uplink}" ct state new accept
    iifname "{uplink}" ct status dnat accept
  }}
  chain prerouting {{
    type nat hook prerouting priority dstnat; policy accept;
    iifname "{uplink}" ip daddr {outer} tcp dport != {agent_port} dnat ip to {GUEST_IP}
    iifname "{uplink}" ip daddr {outer} meta l4proto udp dnat ip to {GUEST_IP}
  }}
  chain postrouting {{
    type nat hook postrouting priority srcnat; policy accept;
    oifname "{uplink}" masquerade
  }}
}}
"""


def egress_rules(*, tap: str, rules: Rules) -> str:
    """Return the rules of a sandbox that has its own, replacing those of before.

    All TCP is redirected to the sandbox's egress process; while there is none, the kernel refuses.
    Everything else is judged here, by ranges alone. What is private passes on to the slot's table.
    """
    private, permitted, allowed, denied = (
        ", ".join(map(str, ipaddress.collapse_addresses(found)))
        for found in (rules.unreachable, rules.permitted, rules.allowed, rules.denied)
    )
    from_guest = f'iifname "{tap}" ip saddr {GUEST_IP} ip daddr != {GATEWAY_IP}'
    refused = "reject with icmp type admin-prohibited"
    redirected = f"redirect to :{EGRESS_PORT}"
    return f"""{NO_EGRESS_RULES}
table inet sandyard_egress {{
  chain prerouting {{
    type nat hook prerouting priority dstnat; policy accept;
    {_when(permitted, f"{from_guest} meta l4proto tcp ip daddr", redirected)}
    {from_guest} meta l4proto tcp ip daddr != {{ {private} }} {redirected}
  }}
  chain forward {{
    type filter hook forward priority filter - 2; policy accept;
    iifname "{tap}" ct direction original jump outgoing
    # Answers in exchanges that the guest began before these rules.
    oifname "{tap}" ct direction reply jump answers
  }}
  chain answers {{
    {_when(permitted, "ip saddr", "accept")}
    ip saddr {{ {private} }} accept
    meta l4proto tcp drop
    {_when(allowed, "ip saddr", "accept")}
    {_when(denied, "ip saddr", "drop")}
    {"drop" if rules.denies else "accept"}
  }}
  chain outgoing {{
    {_when(permitted, "ip daddr", "jump judged")}
    ip daddr {{ {private} }} accept
    jump judged
  }}
  chain judged {{
    # Connections of the time before these rules.
    meta l4proto tcp reject with tcp reset
    {"udp dport 443 " + refused if rules.ended else ""}
    {_when(allowed, "ip daddr", "accept")}
    {_when(denied, "ip daddr", refused)}
    {refused if rules.denies else "accept"}
  }}
}}
"""


NO_EGRESS_RULES = """
table inet sandyard_egress {}
delete table inet sandyard_egress
"""
"""What removes `egress_rules`."""


def _when(ranges: str, condition: str, verdict: str) -> str:
    return f"{condition} {{ {ranges} }} {verdict}" if ranges else ""


def host_rules(
    *,
    table: str,
    prefix: str,
    subnet: ipaddress.IPv4Network,
    allow: Sequence[str],
    neighbours: Sequence[str],
) -> str:
    """Return the rules on the host's side of all slots, replacing the table.

    `neighbours` are the networks that the host is connected to; see `new_neighbours`.
    """
    return f"""
table inet {table} {{}}
delete table inet {table}
table inet {table} {{
  set neighbours {{
    type ipv4_addr; flags interval; auto-merge;
    {_elements(neighbours)}
  }}
  chain input {{
    type filter hook input priority filter; policy accept;
    iifname "{prefix}*" ct state established,related accept
    iifname "{prefix}*" drop
  }}
  chain forward {{
    type filter hook forward priority filter; policy accept;
    iifname "{prefix}*" jump from_slots
    oifname "{prefix}*" jump to_slots
  }}
  chain from_slots {{
    oifname "{_ANY_SLOT}*" drop
    meta nfproto ipv6 drop
    ct state established,related accept
    {_accept(allow, "")}
    ip daddr {{ {", ".join(UNREACHABLE)} }} drop
    ip daddr @neighbours drop
  }}
  chain to_slots {{
    ct state established,related accept
    drop
  }}
  chain postrouting {{
    type nat hook postrouting priority srcnat; policy accept;
    ip saddr {subnet} oifname != "{prefix}*" masquerade
  }}
}}
"""


def new_neighbours(*, table: str, neighbours: Sequence[str]) -> str:
    """Return commands that replace the host's neighbour networks."""
    added = f"add element inet {table} neighbours {{ {', '.join(neighbours)} }}\n"
    return f"flush set inet {table} neighbours\n" + (added if neighbours else "")


def forward_exceptions(ruleset: object, *, prefix: str, table: str) -> str:
    """Return rules that accept our traffic despite another tool's default drop on forwarding, if
    any.

    Docker sets the policy of its FORWARD chain to drop and reserves the chain DOCKER-USER for such
    rules. `ruleset` is the decoded output of `nft -j list ruleset`.
    """
    entries = ruleset.get("nftables", []) if isinstance(ruleset, dict) else []
    chains = [entry["chain"] for entry in entries if "chain" in entry]
    comments = {
        (rule["family"], rule["table"], rule["chain"])
        for rule in (entry["rule"] for entry in entries if "rule" in entry)
        if rule.get("comment") == table
    }
    lines = []
    for chain in chains:
        if chain.get("hook") != "forward" or chain.get("policy") != "drop":
            continue
        beside = {one["name"] for one in chains if one["table"] == chain["table"]}
        name = "DOCKER-USER" if "DOCKER-USER" in beside else chain["name"]
        if (chain["family"], chain["table"], name) in comments:
            continue
        where = f"{chain['family']} {chain['table']} {name}"
        lines += [
            f'insert rule {where} {direction} "{prefix}*" counter accept comment "{table}"'
            for direction in ("iifname", "oifname")
        ]
    return "".join(f"{line}\n" for line in lines)


def exceptions_to_remove(ruleset: object, *, table: str) -> str:
    """Return commands that remove what `forward_exceptions` added."""
    entries = ruleset.get("nftables", []) if isinstance(ruleset, dict) else []
    rules = [entry["rule"] for entry in entries if "rule" in entry]
    return "".join(
        f"delete rule {rule['family']} {rule['table']} {rule['chain']} handle {rule['handle']}\n"
        for rule in rules
        if rule.get("comment") == table
    )


def _elements(networks: Sequence[str]) -> str:
    return f"elements = {{ {', '.join(networks)} }}" if networks else ""


def _accept(allow: Sequence[str], condition: str) -> str:
    return f"{condition} ip daddr {{ {', '.join(allow)} }} accept" if allow else ""
