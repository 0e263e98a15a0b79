"""Viaduct: a hypervisor and a user-space virtual switch in Python with a Rust core."""
