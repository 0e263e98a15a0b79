//! The architectural registers of an x86-64 processor, whatever executes its instructions.

/// A segment register with its hidden part (Intel SDM 3, 3.4.3).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Segment {
    /// What the guest loaded.
    pub selector: u16,
    /// Linear address of its first byte.
    pub base: u64,
    /// Offset of its last byte, in bytes whatever `g` says.
    pub limit: u32,
    /// 4 bits: code or data, direction, access (3.4.5.1).
    pub kind: u8,
    /// Privilege level.
    pub dpl: u8,
    /// Whether it is usable.
    pub present: bool,
    /// 64-bit code.
    pub l: bool,
    /// 32-bit default size.
    pub db: bool,
    /// Code or data, and not a system segment.
    pub s: bool,
    /// Its descriptor's limit counts pages.
    pub g: bool,
}

/// A descriptor table register.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Table {
    /// Linear address.
    pub base: u64,
    /// Offset of the last byte.
    pub limit: u16,
}

macro_rules! registers {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {
        /// What a program, an operating system and a boot loader know of a processor.
        #[derive(Clone, Debug, Default, PartialEq, Eq)]
        #[expect(missing_docs, reason = "the architecture's names")]
        pub struct Registers {
            $($(#[$doc])* pub $name: u64,)*
            pub cs: Segment,
            pub ds: Segment,
            pub es: Segment,
            pub ss: Segment,
            pub fs: Segment,
            pub gs: Segment,
            pub tr: Segment,
            pub ldt: Segment,
            pub gdt: Table,
            pub idt: Table,
        }

        /// The registers that are plain numbers, by name.
        pub const NAMES: &[&str] = &[$(stringify!($name)),*];

        impl Registers {
            /// A plain register, if there is one of that name.
            pub fn number(&mut self, name: &str) -> Option<&mut u64> {
                match name {
                    $(stringify!($name) => Some(&mut self.$name),)*
                    _ => None,
                }
            }

            /// A segment register, if there is one of that name.
            pub fn segment(&mut self, name: &str) -> Option<&mut Segment> {
                Some(match name {
                    "cs" => &mut self.cs,
                    "ds" => &mut self.ds,
                    "es" => &mut self.es,
                    "ss" => &mut self.ss,
                    "fs" => &mut self.fs,
                    "gs" => &mut self.gs,
                    "tr" => &mut self.tr,
                    "ldt" => &mut self.ldt,
                    _ => return None,
                })
            }

            /// A descriptor table register, if there is one of that name.
            pub fn table(&mut self, name: &str) -> Option<&mut Table> {
                match name {
                    "gdt" => Some(&mut self.gdt),
                    "idt" => Some(&mut self.idt),
                    _ => None,
                }
            }
        }
    };
}

registers! {
    rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8, r9, r10, r11, r12, r13, r14, r15, rip, rflags,
    cr0, cr2, cr3, cr4, cr8, efer, apic_base,
}

impl Registers {
    /// The names of the segment registers.
    pub const SEGMENTS: [&'static str; 8] = ["cs", "ds", "es", "ss", "fs", "gs", "tr", "ldt"];
    /// The names of the descriptor table registers.
    pub const TABLES: [&'static str; 2] = ["gdt", "idt"];
}
