"""The virtual switch: configuration, ports, control socket."""
