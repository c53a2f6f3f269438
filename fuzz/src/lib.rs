//! What the fuzz targets share: the limits of every input, images as inputs, operations as inputs.

pub mod image;
pub mod limits;
pub mod operations;
