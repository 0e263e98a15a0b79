"""The machine: a hypervisor whose control is here and whose exits are handled in Rust."""
