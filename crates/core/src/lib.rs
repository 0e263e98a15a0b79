//! The extension module `viaduct._core`: the pure crates as Python sees them. Nothing else knows Python.

use pyo3::prelude::*;

/// The Rust half of Viaduct.
#[pymodule]
mod _core {
    #[pymodule_export]
    const VERSION: &str = env!("CARGO_PKG_VERSION");
}
