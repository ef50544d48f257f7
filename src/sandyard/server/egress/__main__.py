"""Runs the parent of egress processes; its first descriptor is the server's end of a socket, and
its argument, if any, a file with further authorities that hosts are checked by."""

import socket
import sys

from sandyard.server.egress.parent import serve

if __name__ == "__main__":
    serve(socket.socket(fileno=0), *sys.argv[1:2])
