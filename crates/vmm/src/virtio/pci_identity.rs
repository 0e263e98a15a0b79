//! What PCI calls each virtio device (virtio 1.2, 4.1.2.1; PCI Code and ID Assignment for classes).

/// What transitional devices have as revision, and modern ones must not (4.1.2.1).
pub(super) const TRANSITIONAL_REVISION: u8 = 0;

const NET: u16 = 1;
const BLOCK: u16 = 2;
const CONSOLE: u16 = 3;
const SCSI: u16 = 8;
const FILE_SYSTEM: u16 = 26;

/// The PCI device id, if there is one.
pub(super) fn device(device_id: u16, transitional: bool) -> Option<u16> {
    if !transitional {
        return 0x1040u16.checked_add(device_id).filter(|id| *id <= 0x107F);
    }
    Some(match device_id {
        NET => 0x1000,
        BLOCK => 0x1001,
        // The memory balloon.
        5 => 0x1002,
        CONSOLE => 0x1003,
        SCSI => 0x1004,
        // The entropy source.
        4 => 0x1005,
        // The 9P transport.
        9 => 0x1009,
        _ => return None,
    })
}

/// The class: what a person sees in a list of devices. Drivers do not look at it.
pub(super) fn class(device_id: u16) -> u32 {
    match device_id {
        NET => 0x02_00_00,
        BLOCK | SCSI => 0x01_00_00,
        FILE_SYSTEM => 0x01_80_00,
        CONSOLE => 0x07_80_00,
        // Unclassified, but not something very old.
        _ => 0x00_FF_00,
    }
}
