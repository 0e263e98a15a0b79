"""The lab: a throw-away computer with hardware virtualization, vhost-net, an IOMMU and an SR-IOV card, for tests.

It is a machine of QEMU's, emulated down to AMD's SVM, so that it runs wherever QEMU does. docs/lab.md says how to use
it.

    packages.py     Debian packages, downloaded and unpacked without being installed
    tree.py         what they unpack to: the lab's root directory, whose programs run on the host as well
    image.py        the files that the lab and the guests in it boot, made from the tree and kept
    guest_image.py  those of the guests
    checkout.py     this repository as the lab sees it
    machine.py      the lab itself, running one command
    guest.py        a guest in the lab, run by us or by QEMU
    relay.py        tests that pytest on the host collects, pytest in the lab runs, and both report
"""
