//! What the fuzz targets share: the limits of every input, images, packed layers
//! and operations as inputs.

pub mod image;
pub mod limits;
pub mod operations;
pub mod packed;
