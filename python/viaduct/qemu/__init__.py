"""Virtual machines of QEMU on a switch: a small Linux that boots in seconds, for demonstrations and tests."""
