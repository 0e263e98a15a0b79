//! A processor as the machine sees it: it runs until it needs something.

use serde_json::Value;

use super::{EngineError, Registers};

/// Why a processor stopped executing instructions.
///
/// Data of an access is where the processor will look for it, or has left it: the access completes when it runs again.
#[derive(Debug)]
pub enum Exit<'a> {
    /// `IN` or `INS`: `data` holds one or more accesses of `width` bytes, all to one port.
    PortRead {
        /// The port.
        port: u16,
        /// Bytes of one access: 1, 2 or 4.
        width: usize,
        /// Where the answers go.
        data: &'a mut [u8],
    },
    /// `OUT` or `OUTS`, in the same form.
    PortWrite {
        /// The port.
        port: u16,
        /// Bytes of one access: 1, 2 or 4.
        width: usize,
        /// What is written.
        data: &'a [u8],
    },
    /// A load from an address without memory.
    Read {
        /// The guest-physical address.
        address: u64,
        /// Where the answer goes, 1 to 8 bytes.
        data: &'a mut [u8],
    },
    /// A store to an address without memory.
    Write {
        /// The guest-physical address.
        address: u64,
        /// What is written, 1 to 8 bytes.
        data: &'a [u8],
    },
    /// Somebody asked for it ([`Kick`]), or a signal came: nothing is left to complete.
    Interrupted,
    /// `HLT`, and the engine has no interrupt controller that could end it.
    Halt,
    /// An exception in the handling of a double fault: the processor is in shutdown state (Intel SDM 3, 6.15).
    TripleFault,
    /// The guest asked the hypervisor to shut down or reset, or told it of a crash.
    SystemEvent {
        /// What kind, in the engine's numbering.
        kind: u32,
        /// What came with it.
        data: Vec<u64>,
    },
    /// The guest acknowledged a level-triggered interrupt of an IOAPIC that is not in the engine.
    EndOfInterrupt {
        /// The vector.
        vector: u8,
    },
    /// A breakpoint or a single step of the debugger.
    Debug {
        /// Where.
        address: u64,
        /// Whether it was a breakpoint instruction, which may be the guest's own.
        instruction: bool,
        /// The value of DR6 (Intel SDM 3, 17.2.3).
        dr6: u64,
    },
    /// The engine cannot go on.
    Failed(String),
}

/// What a debugger wants of a processor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Debug {
    /// Breakpoint instructions (INT3) are the debugger's.
    pub breakpoints: bool,
    /// Stop after one instruction.
    pub single_step: bool,
    /// DR0 to DR3 and DR7: addresses, and when they stop (Intel SDM 3, 17.2).
    pub hardware: Option<([u64; 4], u64)>,
}

/// Registers of floating point and vectors (Intel SDM 1, 8 and 10).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Vectors {
    /// ST0 to ST7.
    pub st: [[u8; 10]; 8],
    /// Control, status and abridged tag word.
    pub words: [u16; 3],
    /// XMM0 to XMM15.
    pub xmm: [u128; 16],
    /// Control and status of vectors.
    pub mxcsr: u32,
}

/// Makes a processor's [`Vcpu::run`] return. Any thread may call.
pub trait Kick: Send + Sync {
    /// From now on, and until [`clear`](Kick::clear), `run` returns [`Exit::Interrupted`] at once, after it has
    /// completed the access that it returned with before. A `run` in progress returns.
    fn kick(&self);

    /// Lets the processor run again.
    fn clear(&self);
}

/// One processor. Only one thread at a time calls; which one, [`bind`](Vcpu::bind) says.
pub trait Vcpu: Send {
    /// The calling thread is the one that runs this processor from now on.
    ///
    /// # Errors
    /// [`EngineError`].
    fn bind(&mut self) -> Result<(), EngineError>;

    /// What interrupts it; one for all calls.
    fn kicker(&self) -> Box<dyn Kick>;

    /// Executes the guest's instructions until one of them needs an answer.
    ///
    /// # Errors
    /// [`EngineError`]: the engine itself failed.
    fn run(&mut self) -> Result<Exit<'_>, EngineError>;

    /// The architectural registers.
    ///
    /// # Errors
    /// [`EngineError`].
    fn registers(&self) -> Result<Registers, EngineError>;

    /// The guest-physical address that the guest's page tables give for a linear one now.
    fn translate(&self, linear: u64) -> Option<u64>;

    /// Fills `data` from memory at a linear address, and returns how many bytes of it: there may be no more.
    fn read_memory(&self, linear: u64, data: &mut [u8]) -> usize;

    /// Writes `data` to memory at a linear address, even where the guest may not, and returns how many bytes of it.
    fn write_memory(&mut self, linear: u64, data: &[u8]) -> usize;

    /// The registers of floating point and vectors that debuggers show.
    ///
    /// # Errors
    /// [`EngineError`].
    fn vectors(&self) -> Result<Vectors, EngineError>;

    /// Changes them.
    ///
    /// # Errors
    /// [`EngineError`].
    fn set_vectors(&mut self, vectors: &Vectors) -> Result<(), EngineError>;

    /// How many hardware breakpoints it has.
    fn hardware_breakpoints(&self) -> usize;

    /// What ends a run with [`Exit::Debug`] from now on.
    ///
    /// # Errors
    /// [`EngineError`], if the engine cannot.
    fn set_debug(&mut self, debug: &Debug) -> Result<(), EngineError>;

    /// The breakpoint instruction that it has just met is the guest's own: the guest gets its exception.
    ///
    /// # Errors
    /// [`EngineError`].
    fn give_breakpoint(&mut self) -> Result<(), EngineError>;

    /// Changes the architectural registers.
    ///
    /// # Errors
    /// [`EngineError`], if no processor can be in such a state.
    fn set_registers(&mut self, registers: &Registers) -> Result<(), EngineError>;

    /// All that it is. Call it when nothing is left to complete ([`Exit::Interrupted`]).
    ///
    /// # Errors
    /// [`EngineError`].
    fn save(&self) -> Result<Value, EngineError>;

    /// Puts back what was saved of the processor of the same number in a machine made alike.
    ///
    /// # Errors
    /// [`EngineError::Invalid`] if it is no such thing; [`EngineError`] if this host cannot be like the one before.
    fn restore(&mut self, state: &Value) -> Result<(), EngineError>;

    /// The processor will stand still for a while, and the guest's watchdogs should know that it was not its fault.
    fn note_pause(&mut self);
}
