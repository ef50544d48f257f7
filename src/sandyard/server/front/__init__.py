"""The HTTP listener that all faces share: connections, dispatch by host, the edge, the proxy."""
