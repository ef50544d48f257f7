"""What a node needs of its host: network, firewall, names, disks, accounts, room, hypervisors."""
