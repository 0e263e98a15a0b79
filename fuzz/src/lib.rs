//! What the fuzz targets do, apart from libFuzzer: each takes bytes, plays a hostile peer by them, and panics if a promise
//! is broken. So a finding runs in a plain test as well (`cargo test --manifest-path fuzz/Cargo.toml`), without any
//! sanitizer.
//!
//! The bytes are a program: an operation, its operands, the next operation. Operands are drawn so that they are often
//! nearly right, because what is all wrong does not get far. An input that ends in the middle ends the run.

pub mod block;
pub mod device;
pub mod driver;
pub mod e1000;
pub mod forward;
pub mod guest_driver;
pub mod guest_memory;
pub mod ioapic;
pub mod mac_table;
pub mod memory;
pub mod offload;
pub mod pc;
pub mod platform;
pub mod power;
pub mod quiet_vm;
pub mod replay;
pub mod ring;
pub mod stack;
pub mod transport;

/// A target: runs until its input ends.
pub type Target = fn(&[u8]) -> libfuzzer_sys::arbitrary::Result<()>;

/// All of them, by the names of their programs and corpora.
pub const TARGETS: &[(&str, Target)] = &[
    ("device_split", device::split),
    ("device_packed", device::packed),
    ("driver_split", driver::split),
    ("driver_packed", driver::packed),
    ("guest_driver", guest_driver::run),
    ("forward", forward::run),
    ("offload", offload::run),
    ("platform", platform::run),
    ("replay", replay::run),
    ("mac_table", mac_table::run),
    ("memory", memory::run),
    ("stack", stack::run),
    ("block_request", block::run),
    ("virtio_mmio", transport::mmio),
    ("virtio_pci", transport::pci),
    ("pci_config", transport::pci_config),
    ("serial", pc::serial),
    ("rtc", pc::rtc),
    ("power", power::run),
    ("ioapic", ioapic::run),
    ("e1000", e1000::run),
];

/// The body of a program in `fuzz_targets`.
#[macro_export]
macro_rules! target {
    ($name:path) => {
        libfuzzer_sys::fuzz_target!(|data: &[u8]| {
            // An input that ends early is as good as any other.
            let _ = $name(data);
        });
    };
}
