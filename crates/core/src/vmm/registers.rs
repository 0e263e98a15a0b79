//! A vCPU's registers as a Python dictionary.

use pyo3::exceptions::{PyKeyError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyDict;
use viaduct_vmm::engine::{NAMES, Registers, Segment, Table};

/// Selector, base, limit, type, dpl, present, l, db, s, g.
type Tuple = (u16, u64, u32, u8, u8, u8, u8, u8, u8, u8);

/// All registers by name.
pub(super) fn to_dict<'py>(py: Python<'py>, mut registers: Registers) -> PyResult<Bound<'py, PyDict>> {
    let values = PyDict::new(py);
    for name in NAMES {
        values.set_item(name, registers.number(name).copied())?;
    }
    for name in Registers::SEGMENTS {
        values.set_item(name, registers.segment(name).map(|segment| to_tuple(*segment)))?;
    }
    for name in Registers::TABLES {
        values.set_item(name, registers.table(name).map(|table| (table.base, table.limit)))?;
    }
    Ok(values)
}

/// Changes the registers that are named.
pub(super) fn update(registers: &mut Registers, values: &Bound<'_, PyDict>) -> PyResult<()> {
    for (name, value) in values {
        let name: String = name.extract()?;
        let wrong = |error: PyErr| PyValueError::new_err(format!("register {name}: {error}"));
        if let Some(number) = registers.number(&name) {
            *number = value.extract().map_err(wrong)?;
        } else if let Some(segment) = registers.segment(&name) {
            *segment = from_tuple(value.extract().map_err(wrong)?);
        } else if let Some(table) = registers.table(&name) {
            let (base, limit) = value.extract().map_err(wrong)?;
            *table = Table { base, limit };
        } else {
            return Err(PyKeyError::new_err(format!("there is no register {name}")));
        }
    }
    Ok(())
}

fn to_tuple(s: Segment) -> Tuple {
    (s.selector, s.base, s.limit, s.kind, s.dpl, s.present.into(), s.l.into(), s.db.into(), s.s.into(), s.g.into())
}

fn from_tuple((selector, base, limit, kind, dpl, present, l, db, s, g): Tuple) -> Segment {
    let (present, l, db, s, g) = (present != 0, l != 0, db != 0, s != 0, g != 0);
    Segment { selector, base, limit, kind, dpl, present, l, db, s, g }
}
