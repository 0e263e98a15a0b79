//! The fault guard: a front-end that truncates its file must not kill us.
