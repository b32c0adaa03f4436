"""What a VM may reach of the network, and the host's end of it: names, connections, and who is refused."""
