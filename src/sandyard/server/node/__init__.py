"""One host: its machines, network slots, disks, images and the link to the agents."""
