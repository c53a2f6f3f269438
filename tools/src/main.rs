//! The `thinply` command.
fn main() {}
