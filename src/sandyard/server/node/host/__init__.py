"""A node's use of its host: network, firewall, names, disks, accounts, capacity, hypervisors."""
