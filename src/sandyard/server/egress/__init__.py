"""The egress process: what decides, beside one sandbox with rules, what it may reach.

It serves the sandbox's DNS, and the TCP connections that the firewall of its slot redirects to it.
It sees the network of that slot alone, no files, and runs under an account of its own. It outlives
the server, as machines do; while it is down, everything is refused.

`config` is its configuration, `parent` starts it, `process` is its entry. `dns` also serves
sandboxes without rules.
"""
