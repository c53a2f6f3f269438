//! JSON as the store keeps it.

use serde::Serialize;
use serde_json::Value;

use super::files::read_small;
use crate::error::{Error, ErrorKind, Result};
use crate::storage::Folder;

/// The bytes of a value, the same for equal values: keys in order, no white space.
pub(super) fn canonical(value: &impl Serialize) -> Result<Vec<u8>> {
    let value = serde_json::to_value(value).map_err(|error| invalid(&error))?;
    serde_json::to_vec(&sorted(value)).map_err(|error| invalid(&error))
}

/// Whether maps keep their order depends on features of serde_json that others choose.
fn sorted(value: Value) -> Value {
    match value {
        Value::Object(map) => {
            let mut entries: Vec<_> = map.into_iter().map(|(k, v)| (k, sorted(v))).collect();
            entries.sort_by(|a, b| a.0.cmp(&b.0));
            Value::Object(entries.into_iter().collect())
        }
        Value::Array(items) => items.into_iter().map(sorted).collect(),
        other => other,
    }
}

fn invalid(error: &serde_json::Error) -> Error {
    Error::new(ErrorKind::Corrupt, format!("not the JSON that was expected: {error}"))
}

/// Reads bytes as JSON.
pub(super) fn parse<T: serde::de::DeserializeOwned>(bytes: &[u8]) -> Result<T> {
    serde_json::from_slice(bytes).map_err(|error| invalid(&error))
}

/// Reads a JSON file; `None` where it is not there.
pub(super) fn read<T: serde::de::DeserializeOwned>(
    folder: &dyn Folder,
    name: &str,
) -> Result<Option<T>> {
    let Some(bytes) = read_small(folder, name)? else { return Ok(None) };
    parse(&bytes).map(Some).map_err(|error| error.in_file(folder.path().join(name)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_values_have_equal_bytes() {
        let a: Value = serde_json::from_str(r#"{"b":[{"z":1,"a":2}],"a":null}"#).unwrap();
        let b: Value = serde_json::from_str(r#"{"a":null,"b":[{"a":2,"z":1}]}"#).unwrap();
        assert_eq!(canonical(&a).unwrap(), br#"{"a":null,"b":[{"a":2,"z":1}]}"#);
        assert_eq!(canonical(&a).unwrap(), canonical(&b).unwrap());
    }
}
